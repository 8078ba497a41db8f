//! The one error of the kernels: an argument or encoded bytes that were refused.
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

pub type Result<T> = std::result::Result<T, Refused>;

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
