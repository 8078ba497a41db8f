//! What the kernels say instead of panicking: an argument that was refused, or sealed bytes that are not what they should be.
#![forbid(unsafe_code)]

use std::fmt;

/// What was refused and why. Python sees it as a `ValueError` with this text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused(pub String);

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

pub type Result<T, E = Refused> = std::result::Result<T, E>;

/// `Err(Refused)` with a message built only when it is needed.
pub fn refuse<T>(message: impl Into<String>) -> Result<T> {
    Err(Refused(message.into()))
}

/// Refuse unless `found == wanted`; `what` names the thing that is measured.
pub fn same_length(what: &str, found: usize, wanted: usize) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    refuse(format!("{what} has {found} bytes, {wanted} are needed"))
}

/// What was wrong with sealed bytes. Python sees its `DamageError`, its `FormatError`, or a `ValueError`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// They were not sealed under this key, at this place, as this.
    Damaged(String),
    /// They were, and are no valid segment all the same.
    Malformed(String),
    /// The call itself was wrong.
    Refused(Refused),
}

impl From<Refused> for Fault {
    fn from(refused: Refused) -> Fault {
        Fault::Refused(refused)
    }
}

/// `Err(Fault::Malformed)` with that message.
pub fn malformed<T>(message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Malformed(message.into()))
}
