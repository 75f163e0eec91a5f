//! `--vsock cid=N,uds=PATH`.

use std::path::PathBuf;
use std::str::FromStr;

/// A socket device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's CID.
    pub cid: u32,
    /// The unix socket that leads to it.
    pub path: PathBuf,
}

/// A text that is no socket device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseVsockError {
    /// What is neither `cid=` nor `uds=`, or one of them twice.
    #[error("{0:?} is not cid=N or uds=PATH, once each (a comma in PATH is written ,,)")]
    Property(String),
    /// One of them is missing.
    #[error("{0} is missing: cid=N,uds=PATH")]
    Missing(&'static str),
    /// No number a guest can have.
    #[error("cid {0:?} is no number from 3 to 4294967294")]
    Cid(String),
}

impl FromStr for VsockConfig {
    type Err = ParseVsockError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (mut cid, mut path) = (None, None);
        for property in super::words(text) {
            match property.split_once('=') {
                Some(("cid", number)) if cid.is_none() => {
                    // Below are those of the hypervisor and the host, the last is any (virtio 1.2, 5.10.4).
                    let valid = number.parse().ok().filter(|cid| (3..u32::MAX).contains(cid));
                    cid = Some(valid.ok_or_else(|| ParseVsockError::Cid(number.to_owned()))?);
                }
                Some(("uds", uds)) if path.is_none() && !uds.is_empty() => {
                    path = Some(PathBuf::from(uds));
                }
                _ => return Err(ParseVsockError::Property(property)),
            }
        }
        let cid = cid.ok_or(ParseVsockError::Missing("cid"))?;
        Ok(Self { cid, path: path.ok_or(ParseVsockError::Missing("uds"))? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_device_has_a_cid_and_a_path() {
        let parsed = VsockConfig { cid: 3, path: "/run/v=1.sock".into() };
        assert_eq!("cid=3,uds=/run/v=1.sock".parse(), Ok(parsed.clone()));
        assert_eq!("uds=/run/v=1.sock,cid=3".parse(), Ok(parsed));
        let comma = VsockConfig { cid: 3, path: "a,b".into() };
        assert_eq!("cid=3,uds=a,,b".parse(), Ok(comma), "as in a disk");
        for bad in [
            "",
            "cid=3",
            "uds=a",
            "cid=3,uds=",
            "cid=2,uds=a",
            "cid=4294967295,uds=a",
            "cid=-1,uds=a",
            "cid=x,uds=a",
            "cid=3,uds=a,uds=b",
            "cid=3,uds=a,port=1",
            "3,a",
        ] {
            assert!(bad.parse::<VsockConfig>().is_err(), "{bad:?}");
        }
    }
}
