//! Checked big-endian reading: the one place that slices raw bytes of binary files.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use super::{Fault, FormatError};

/// Reads forward through a slice. Every fault names the part of the file and its offset in the whole file.
#[derive(Clone)]
pub struct Cursor<'a> {
    part: &'static str,
    /// Offset in the file of the first byte of `data`.
    base: u64,
    data: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Over a whole file.
    pub fn new(part: &'static str, data: &'a [u8]) -> Self {
        Self::based(part, 0, data)
    }

    /// Over a piece of a file that starts at `base`.
    pub fn based(part: &'static str, base: u64, data: &'a [u8]) -> Self {
        Self { part, base, data, at: 0 }
    }

    /// Offset in the file of the next byte.
    pub fn offset(&self) -> u64 {
        self.base.saturating_add(self.at as u64)
    }

    /// Bytes that are left.
    pub fn remaining(&self) -> usize {
        self.data.len().saturating_sub(self.at)
    }

    /// Nothing is left.
    pub fn is_at_end(&self) -> bool {
        self.remaining() == 0
    }

    /// All bytes that are left, without stepping over them.
    pub fn rest(&self) -> &'a [u8] {
        self.data.get(self.at..).unwrap_or_default()
    }

    /// A fault at the next byte.
    pub fn fault(&self, fault: Fault) -> FormatError {
        FormatError { part: self.part, offset: self.offset(), fault }
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let found = self.at.checked_add(len).and_then(|end| Some((end, self.data.get(self.at..end)?)));
        let Some((end, bytes)) = found else {
            return Err(self.fault(Fault::Truncated { need: len as u64, have: self.remaining() as u64 }));
        };
        self.at = end;
        Ok(bytes)
    }

    /// The next `len` bytes, for a length that the file itself states in 64 bits.
    pub fn take_u64(&mut self, len: u64) -> Result<&'a [u8], FormatError> {
        match usize::try_from(len) {
            Ok(len) => self.take(len),
            Err(_) => Err(self.fault(Fault::Truncated { need: len, have: self.remaining() as u64 })),
        }
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let bytes = self.take(N)?;
        Ok(bytes.try_into().unwrap_or([0; N]))
    }

    pub fn u8(&mut self) -> Result<u8, FormatError> {
        self.array().map(|[byte]| byte)
    }

    pub fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_be_bytes)
    }
}

/// Big-endian number at `at`; `None` when the slice ends before it does.
pub fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(array_at(data, at)?))
}

/// Big-endian number at `at`; `None` when the slice ends before it does.
pub fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(array_at(data, at)?))
}

/// `N` bytes at `at`; `None` when the slice ends before they do.
pub fn array_at<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// CRC-32 as zlib computes it; every checksum of Cyrus is this one.
pub fn crc32(data: &[u8]) -> u32 {
    crc32fast::hash(data)
}

/// A stored checksum is right. Under a fuzzer every one is, or it would never get past the first.
pub fn crc_holds(stored: u32, computed: u32) -> bool {
    stored == computed || cfg!(fuzzing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_big_endian_and_faults_name_the_place() {
        let mut cursor = Cursor::based("file", 0x100, &[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(cursor.u16(), Ok(0x0102));
        assert_eq!(cursor.u32(), Ok(0x0304_0506));
        let error = cursor.u32().expect_err("one byte is left");
        assert_eq!(error.to_string(), "file at byte 0x106: 4 bytes expected, 1 are there");
        assert_eq!(cursor.u8(), Ok(7));
        assert!(cursor.is_at_end());
        assert!(cursor.take_u64(u64::MAX).is_err());
    }

    #[test]
    fn crc_check_value() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
