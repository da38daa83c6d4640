//! A replica that was promoted is not written to: looked at whenever a session is opened to write.

use super::push::NoBodies;
use crate::model::{Denial, FENCE, Promotion, Replica, ReplicaError, ReplicaTarget, Step, UserId};

/// A session for somebody who is going to write.
pub fn open(target: &dyn ReplicaTarget) -> Result<Box<dyn Replica>, ReplicaError> {
    let mut session = target.open()?;
    match raised(&mut *session) {
        Ok(None) => Ok(session),
        Ok(Some(promotion)) => {
            session.close();
            Err(ReplicaError::Denied(Denial::Promoted, refusal(&target.name(), &promotion)))
        }
        // One that cannot keep such an annotation has none.
        Err(ReplicaError::Refused(_)) => Ok(session),
        Err(error) => Err(error),
    }
}

/// The promotion that a replica says it had.
pub fn raised(session: &mut dyn Replica) -> Result<Option<Promotion>, ReplicaError> {
    Ok(Promotion::among(&session.view_server_annotations()?))
}

/// Why nothing is sent there, and what helps.
pub fn refusal(replica: &str, promotion: &Promotion) -> String {
    let said = match promotion.at {
        0 => String::new(),
        at => format!(" (said on {} at {at}, seconds since 1970; its source was {})", promotion.host, promotion.source),
    };
    format!(
        "{replica} was promoted{said}: clients may have worked there since, and nothing is pushed over it. `spooltap \
         failback` brings the old source in line with it; `spooltap failback --release` makes it a replica again when the \
         source has all that it has"
    )
}

/// From here on nobody writes to the replica.
pub fn raise(session: &mut dyn Replica, promotion: &Promotion) -> Result<(), ReplicaError> {
    if raised(session)?.is_none() {
        session.apply(&Step::ServerAnnotation(promotion.annotation()), &NoBodies)?;
    }
    Ok(())
}

/// It is a replica again.
pub fn lower(session: &mut dyn Replica) -> Result<(), ReplicaError> {
    if raised(session)?.is_some() {
        let step = Step::RemoveServerAnnotation { entry: FENCE.to_vec(), userid: UserId::from("") };
        session.apply(&step, &NoBodies)?;
    }
    Ok(())
}
