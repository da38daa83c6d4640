//! A sorted map whose copies share all they have in common: a copy costs nothing, a change of one of them the way from
//! the root to one entry, and what differs between two of them is found without looking at what they share.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// A tree balanced by weight. Nodes are changed in place as long as nobody else has them.
#[derive(Clone)]
pub struct SharedMap<K, V> {
    root: Link<K, V>,
}

type Link<K, V> = Option<Arc<Node<K, V>>>;

#[derive(Clone)]
struct Node<K, V> {
    key: K,
    value: V,
    /// Entries from here down.
    size: usize,
    left: Link<K, V>,
    right: Link<K, V>,
}

/// One side of a node may have so many times the entries of the other. This pair of numbers is proven to hold after
/// each insertion and removal (Hirai, Yamamoto: Balancing weight-balanced trees, 2011).
const DELTA: usize = 3;
/// A single rotation is enough while the inner grandchild has less than so many times the entries of the outer one.
const GAMMA: usize = 2;

/// What two maps have at a key: the old value, the new one.
pub type Difference<'a, K, V> = (&'a K, Option<&'a V>, Option<&'a V>);

impl<K: Ord + Clone, V: Clone> SharedMap<K, V> {
    pub fn len(&self) -> usize {
        size(&self.root)
    }

    pub fn is_empty(&self) -> bool {
        self.root.is_none()
    }

    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let mut link = &self.root;
        while let Some(node) = link {
            link = match key.cmp(node.key.borrow()) {
                Ordering::Less => &node.left,
                Ordering::Greater => &node.right,
                Ordering::Equal => return Some(&node.value),
            };
        }
        None
    }

    /// Gives back what was there.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        insert(&mut self.root, key, value)
    }

    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        // Nothing is copied for an entry that is not there.
        self.get(key)?;
        remove(&mut self.root, key)
    }

    /// All entries, ascending.
    pub fn iter(&self) -> Iter<'_, K, V> {
        let mut iter = Iter { stack: Vec::new() };
        iter.descend(&self.root);
        iter
    }

    /// The entries from this key on.
    pub fn from<Q: Ord + ?Sized>(&self, key: &Q) -> Iter<'_, K, V>
    where
        K: Borrow<Q>,
    {
        let mut stack = Vec::new();
        let mut link = &self.root;
        while let Some(node) = link {
            link = if node.key.borrow() < key {
                &node.right
            } else {
                stack.push(&**node);
                &node.left
            };
        }
        Iter { stack }
    }

    /// What is different from an older copy, ascending. Costs in proportion to the changes between the two.
    pub fn since<'a>(&'a self, old: &'a Self) -> Vec<Difference<'a, K, V>>
    where
        V: PartialEq,
    {
        let (mut old, mut new) = (Walk::of(&old.root), Walk::of(&self.root));
        let mut out = Vec::new();
        loop {
            match (old.0.last(), new.0.last()) {
                (Some(Part::Tree(left)), Some(Part::Tree(right))) if Arc::ptr_eq(left, right) => {
                    old.0.pop();
                    new.0.pop();
                }
                (Some(Part::Tree(left)), Some(Part::Tree(right))) if left.size < right.size => new.open(),
                (Some(Part::Tree(_)), _) => old.open(),
                (_, Some(Part::Tree(_))) => new.open(),
                (Some(Part::Entry(left)), Some(Part::Entry(right))) => {
                    let (left, right) = (*left, *right);
                    let order = left.key.cmp(&right.key);
                    if order.is_le() {
                        old.0.pop();
                    }
                    if order.is_ge() {
                        new.0.pop();
                    }
                    match order {
                        Ordering::Less => out.push((&left.key, Some(&left.value), None)),
                        Ordering::Greater => out.push((&right.key, None, Some(&right.value))),
                        Ordering::Equal if left.value == right.value => {}
                        Ordering::Equal => out.push((&right.key, Some(&left.value), Some(&right.value))),
                    }
                }
                (Some(Part::Entry(left)), None) => {
                    out.push((&left.key, Some(&left.value), None));
                    old.0.pop();
                }
                (None, Some(Part::Entry(right))) => {
                    out.push((&right.key, None, Some(&right.value)));
                    new.0.pop();
                }
                (None, None) => return out,
            }
        }
    }
}

fn size<K, V>(link: &Link<K, V>) -> usize {
    link.as_ref().map_or(0, |node| node.size)
}

fn insert<K: Ord + Clone, V: Clone>(link: &mut Link<K, V>, key: K, value: V) -> Option<V> {
    let Some(node) = link else {
        *link = Some(Arc::new(Node { key, value, size: 1, left: None, right: None }));
        return None;
    };
    let node = Arc::make_mut(node);
    let old = match key.cmp(&node.key) {
        Ordering::Less => insert(&mut node.left, key, value),
        Ordering::Greater => insert(&mut node.right, key, value),
        Ordering::Equal => return Some(std::mem::replace(&mut node.value, value)),
    };
    if old.is_none() {
        node.balance();
    }
    old
}

fn remove<K: Ord + Clone + Borrow<Q>, V: Clone, Q: Ord + ?Sized>(link: &mut Link<K, V>, key: &Q) -> Option<V> {
    let node = link.as_mut()?;
    let order = key.cmp(node.key.borrow());
    if order.is_eq() {
        let mut out = link.take()?;
        let node = Arc::make_mut(&mut out);
        *link = match (node.left.take(), node.right.take()) {
            (None, other) | (other, None) => other,
            (left, mut right) => {
                let mut least = take_least(&mut right)?;
                let node = Arc::make_mut(&mut least);
                (node.left, node.right) = (left, right);
                node.balance();
                Some(least)
            }
        };
        return Some(Arc::unwrap_or_clone(out).value);
    }
    let node = Arc::make_mut(node);
    let old = remove(if order.is_lt() { &mut node.left } else { &mut node.right }, key);
    node.balance();
    old
}

/// Takes the first entry out; it has nothing below it then.
fn take_least<K: Ord + Clone, V: Clone>(link: &mut Link<K, V>) -> Link<K, V> {
    let node = Arc::make_mut(link.as_mut()?);
    if node.left.is_none() {
        let right = node.right.take();
        return std::mem::replace(link, right);
    }
    let least = take_least(&mut node.left);
    node.balance();
    least
}

impl<K: Ord + Clone, V: Clone> Node<K, V> {
    fn count(&mut self) {
        self.size = size(&self.left) + size(&self.right) + 1;
    }

    /// After one entry below came or went.
    fn balance(&mut self) {
        self.count();
        let (left, right) = (size(&self.left), size(&self.right));
        if left + right < 2 {
            return;
        }
        if right > DELTA * left {
            if let Some(node) = &mut self.right
                && size(&node.left) >= GAMMA * size(&node.right)
            {
                Arc::make_mut(node).rotate_right();
            }
            self.rotate_left();
        } else if left > DELTA * right {
            if let Some(node) = &mut self.left
                && size(&node.right) >= GAMMA * size(&node.left)
            {
                Arc::make_mut(node).rotate_left();
            }
            self.rotate_right();
        }
    }

    /// The right child takes this place.
    fn rotate_left(&mut self) {
        let Some(mut child) = self.right.take() else { return };
        let node = Arc::make_mut(&mut child);
        self.right = node.left.take();
        self.count();
        std::mem::swap(self, node);
        self.left = Some(child);
        self.count();
    }

    fn rotate_right(&mut self) {
        let Some(mut child) = self.left.take() else { return };
        let node = Arc::make_mut(&mut child);
        self.left = node.right.take();
        self.count();
        std::mem::swap(self, node);
        self.right = Some(child);
        self.count();
    }
}

/// Ascending.
pub struct Iter<'a, K, V> {
    /// Nodes whose left side is done.
    stack: Vec<&'a Node<K, V>>,
}

impl<'a, K, V> Iter<'a, K, V> {
    fn descend(&mut self, mut link: &'a Link<K, V>) {
        while let Some(node) = link {
            self.stack.push(node);
            link = &node.left;
        }
    }
}

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        let node = self.stack.pop()?;
        self.descend(&node.right);
        Some((&node.key, &node.value))
    }
}

enum Part<'a, K, V> {
    Tree(&'a Arc<Node<K, V>>),
    Entry(&'a Node<K, V>),
}

/// A map on its way to be compared; trees are opened as late as possible. The next part is last.
struct Walk<'a, K, V>(Vec<Part<'a, K, V>>);

impl<'a, K, V> Walk<'a, K, V> {
    fn of(link: &'a Link<K, V>) -> Self {
        Self(link.iter().map(Part::Tree).collect())
    }

    fn open(&mut self) {
        let Some(Part::Tree(node)) = self.0.pop() else { return };
        self.0.extend(node.right.iter().map(Part::Tree));
        self.0.push(Part::Entry(node));
        self.0.extend(node.left.iter().map(Part::Tree));
    }
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self { root: None }
    }
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for SharedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        for (key, value) in entries {
            map.insert(key, value);
        }
        map
    }
}

impl<K: Ord + Clone + fmt::Debug, V: Clone + fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn is_balanced<K, V>(link: &Link<K, V>) -> bool {
        let Some(node) = link else { return true };
        let (left, right) = (size(&node.left), size(&node.right));
        let fits = left + right < 2 || (left <= DELTA * right && right <= DELTA * left);
        fits && node.size == left + right + 1 && is_balanced(&node.left) && is_balanced(&node.right)
    }

    fn differences(old: &BTreeMap<u16, u8>, new: &BTreeMap<u16, u8>) -> Vec<(u16, Option<u8>, Option<u8>)> {
        let keys: std::collections::BTreeSet<u16> = old.keys().chain(new.keys()).copied().collect();
        let all = keys.into_iter().map(|key| (key, old.get(&key).copied(), new.get(&key).copied()));
        all.filter(|(_, old, new)| old != new).collect()
    }

    proptest! {
        #[test]
        fn it_does_what_a_btreemap_does(
            steps in prop::collection::vec((any::<bool>(), 0u16..300, any::<u8>(), any::<bool>()), 0..600),
            from in 0u16..300,
        ) {
            let (mut map, mut model) = (SharedMap::default(), BTreeMap::new());
            let (mut old, mut old_model) = (map.clone(), model.clone());
            for (sets, key, value, copies) in steps {
                if copies && value < 40 {
                    (old, old_model) = (map.clone(), model.clone());
                }
                match sets {
                    true => prop_assert_eq!(map.insert(key, value), model.insert(key, value)),
                    false => prop_assert_eq!(map.remove(&key), model.remove(&key)),
                }
                prop_assert!(is_balanced(&map.root));
            }
            prop_assert_eq!(map.len(), model.len());
            prop_assert!(map.iter().eq(model.iter()));
            prop_assert!(old.iter().eq(old_model.iter()), "an older copy stays as it was");
            prop_assert!(map.from(&from).eq(model.range(from..)));
            let since: Vec<_> = map.since(&old).into_iter().map(|(k, o, n)| (*k, o.copied(), n.copied())).collect();
            prop_assert_eq!(since, differences(&old_model, &model));
        }
    }

    /// A key that counts how often it is compared.
    #[derive(Clone, Debug)]
    struct Counted(u32);

    thread_local! {
        static COMPARED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
    }

    impl PartialEq for Counted {
        fn eq(&self, other: &Self) -> bool {
            self.cmp(other).is_eq()
        }
    }
    impl Eq for Counted {}
    impl PartialOrd for Counted {
        fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
            Some(self.cmp(other))
        }
    }
    impl Ord for Counted {
        fn cmp(&self, other: &Self) -> Ordering {
            COMPARED.set(COMPARED.get() + 1);
            self.0.cmp(&other.0)
        }
    }

    #[test]
    fn one_change_among_very_many_costs_little() {
        let mut map: SharedMap<Counted, u32> = (0..100_000).map(|n| (Counted(n * 2), n)).collect();
        let old = map.clone();
        COMPARED.set(0);
        map.insert(Counted(77_777), 0);
        map.remove(&Counted(150_000));
        let since: Vec<_> = map.since(&old).into_iter().map(|(key, _, new)| (key.0, new.copied())).collect();
        assert_eq!(since, [(77_777, Some(0)), (150_000, None)]);
        assert!(COMPARED.get() < 300, "{} comparisons", COMPARED.get());
    }
}
