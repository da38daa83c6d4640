//! A replica that took over. From then on nothing is pushed over it: the fence is a server annotation on the replica, which
//! every spooltap reads before it sends anything, and which no replication carries.

use super::{Annotation, UserId};
use serde::{Deserialize, Serialize};

/// Entry of the server annotation that says that a store was promoted.
pub const FENCE: &[u8] = b"/vendor/spooltap/promoted";

/// What is written down when a replica takes over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promotion {
    /// URL of the replica, without secrets.
    pub replica: String,
    /// Identity of the source that it takes over from; where that could not be read, its imapd.conf.
    pub source: String,
    /// The machine on which that was said.
    pub host: String,
    /// Seconds since 1970.
    pub at: u64,
    /// What spoke against it and was overruled, the first lines.
    #[serde(default)]
    pub overruled: Vec<String>,
}

impl Promotion {
    /// The annotation that stands for it on the replica.
    pub fn annotation(&self) -> Annotation {
        let value = serde_json::to_vec(&Self { overruled: Vec::new(), ..self.clone() }).unwrap_or_default();
        Annotation { entry: FENCE.to_vec(), userid: UserId::from(""), value, modseq: super::ModSeq(0) }
    }

    /// The promotion among a store's server annotations. A value that cannot be read is a promotion all the same.
    pub fn among(annotations: &[Annotation]) -> Option<Self> {
        let fence = annotations.iter().find(|annotation| annotation.entry == FENCE && !annotation.value.is_empty())?;
        Some(serde_json::from_slice(&fence.value).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_on_the_replica_is_read_back() {
        let promotion = Promotion {
            replica: "cyrus:///srv/b".into(),
            source: "spool /var/a".into(),
            host: "a".into(),
            at: 7,
            overruled: Vec::new(),
        };
        let other = Annotation { entry: b"/comment".to_vec(), ..promotion.annotation() };
        assert_eq!(Promotion::among(&[other.clone(), promotion.annotation()]), Some(promotion.clone()));
        assert_eq!(Promotion::among(std::slice::from_ref(&other)), None);
        let odd = Annotation { value: b"by hand".to_vec(), ..promotion.annotation() };
        assert_eq!(Promotion::among(&[odd]), Some(Promotion::default()));
        let emptied = Annotation { value: Vec::new(), ..promotion.annotation() };
        assert_eq!(Promotion::among(&[emptied]), None);
    }
}
