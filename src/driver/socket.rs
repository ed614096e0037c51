//! A session's socket, whatever is spoken on it.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};

/// A non-blocking connection. One enum from the first day, so that an encrypted one is a variant and not a redesign.
#[derive(Debug)]
pub enum Socket {
    /// Plain TCP, non-blocking.
    Plain(TcpStream),
}

impl Socket {
    /// Reads what is there.
    ///
    /// # Errors
    /// As `recv`; `WouldBlock` if there is nothing.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
        }
    }

    /// Writes what the kernel takes.
    ///
    /// # Errors
    /// As `send`; `WouldBlock` if it takes nothing.
    pub fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match (self, slices) {
            (Self::Plain(stream), [slice]) => stream.write(slice),
            (Self::Plain(stream), _) => stream.write_vectored(slices),
        }
    }

    /// Says that nothing more is sent; the peer's last words can still be read.
    pub fn finish_writing(&mut self) {
        match self {
            // The peer may be gone already: then there is nobody to tell.
            Self::Plain(stream) => drop(stream.shutdown(Shutdown::Write)),
        }
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Plain(stream) => stream.as_raw_fd(),
        }
    }
}
