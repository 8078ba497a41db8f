//! Per-block kernels of the replication engine.
//!
//! Plain Rust, one module per idea, each of them safe code that takes slices and
//! returns a `Result`: no kernel panics, whatever it is given. `python.rs` is the
//! only file that knows PyO3, and the only one with `unsafe` in it, because it
//! turns foreign buffers into slices.
//!
//! | module    | idea                                                              |
//! |-----------|-------------------------------------------------------------------|
//! | `grain`   | a window cut into grains; which of them are all zero              |
//! | `scan`    | the hash tracker's pass: zero test and keyed digest while hot      |
//! | `merkle`  | digests of leaves and nodes                                       |
//! | `varint`  | canonical LEB128                                                  |
//! | `extents` | tables of extents and their encoding                              |
//! | `overlay` | one table laid over another, and the payload that results         |
//! | `seal`    | AES-256-GCM, bound to file and place                              |
//! | `chunk`   | a payload cut into chunks; which of them are compressed           |
//! | `segment` | whole segments, sealed and opened                                 |
#![deny(unsafe_code)]

pub mod chunk;
pub mod error;
pub mod extents;
pub mod grain;
pub mod merkle;
pub mod overlay;
pub mod scan;
pub mod seal;
pub mod segment;
pub mod varint;

#[cfg(feature = "python")]
mod python;
