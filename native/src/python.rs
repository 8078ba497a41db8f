//! The Python face of the kernels: foreign buffers in, slices out, `Refused` to `ValueError`.
//!
//! Buffers are taken as plain bytes, whatever their element type, if they are
//! C-contiguous; 64-bit numbers in them are little-endian. The GIL is released for
//! the work. Python may keep several views of the same memory, so a buffer that is
//! written must not overlap another argument (checked), and no other thread may write
//! to any of them during the call (the caller's duty, as for every kernel of numpy).
#![allow(unsafe_code)]

use crate::error::{refuse, Refused, Result};
use crate::{extents, grain, merkle, overlay, scan};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::ops::Range;

impl From<Refused> for PyErr {
    fn from(refused: Refused) -> PyErr {
        PyValueError::new_err(refused.0)
    }
}

/// A contiguous buffer, held for the duration of a call.
struct Memory {
    name: &'static str,
    buffer: PyUntypedBuffer,
}

impl Memory {
    fn get(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Memory> {
        let buffer = PyUntypedBuffer::get(object)?;
        if !buffer.is_c_contiguous() {
            refuse(format!("{name} is not contiguous"))?;
        }
        Ok(Memory { name, buffer })
    }

    fn get_optional(name: &'static str, object: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Memory>> {
        object.map(|object| Memory::get(name, object)).transpose()
    }

    fn range(&self) -> Range<usize> {
        let start = self.buffer.buf_ptr() as usize;
        start..start.saturating_add(self.buffer.len_bytes())
    }

    fn bytes(&self) -> &[u8] {
        if self.buffer.len_bytes() == 0 {
            return &[];
        }
        // SAFETY: the exporter keeps `len_bytes` contiguous bytes (checked in `get`) at `buf_ptr` alive and
        // in place while the buffer is held; nobody writes to them during the call (module comment), and
        // `writable` has checked that no mutable slice of this call overlaps them.
        unsafe { std::slice::from_raw_parts(self.buffer.buf_ptr().cast(), self.buffer.len_bytes()) }
    }

    /// The bytes for writing, if that is allowed and none of `others` overlaps them.
    fn writable(&mut self, others: &[&Memory]) -> Result<&mut [u8]> {
        if self.buffer.readonly() {
            return refuse(format!("{} is read-only", self.name));
        }
        if self.buffer.len_bytes() == 0 {
            return Ok(&mut []);
        }
        let mine = self.range();
        if let Some(other) =
            others.iter().find(|other| other.range().start < mine.end && mine.start < other.range().end)
        {
            return refuse(format!("{} and {} overlap", self.name, other.name));
        }
        // SAFETY: as in `bytes`; the exporter allows writing, and no other slice made in this call overlaps.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.buffer.buf_ptr().cast(), self.buffer.len_bytes()) })
    }
}

#[pyfunction(name = "scan")]
fn scan_window(
    py: Python<'_>,
    window: &Bound<'_, PyAny>,
    grain_bytes: usize,
    secret: &Bound<'_, PyAny>,
    old: Option<&Bound<'_, PyAny>>,
    new: &Bound<'_, PyAny>,
    dirty: &Bound<'_, PyAny>,
) -> PyResult<(usize, usize)> {
    let (window, secret) = (Memory::get("window", window)?, Memory::get("secret", secret)?);
    let old = Memory::get_optional("old", old)?;
    let (mut new, mut dirty) = (Memory::get("new", new)?, Memory::get("dirty", dirty)?);
    let mut inputs = vec![&window, &secret];
    inputs.extend(&old);
    let marks = dirty.writable(&[inputs.as_slice(), &[&new]].concat())?;
    let digests = new.writable(&inputs)?;
    let (window, secret, old) = (window.bytes(), secret.bytes(), old.as_ref().map(Memory::bytes));
    let counts = py.detach(|| scan::scan(window, grain_bytes, secret, old, digests, marks))?;
    Ok((counts.dirty, counts.zero))
}

#[pyfunction]
fn zeros(py: Python<'_>, window: &Bound<'_, PyAny>, grain_bytes: usize, out: &Bound<'_, PyAny>) -> PyResult<()> {
    let (window, mut out) = (Memory::get("window", window)?, Memory::get("out", out)?);
    let marks = out.writable(&[&window])?;
    let window = window.bytes();
    Ok(py.detach(|| grain::mark_zeros(window, grain_bytes, marks))?)
}

#[pyfunction]
fn hash_leaves(
    py: Python<'_>,
    window: &Bound<'_, PyAny>,
    leaf_bytes: usize,
    first_leaf: u64,
    select: Option<&Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (window, mut out) = (Memory::get("window", window)?, Memory::get("out", out)?);
    let select = Memory::get_optional("select", select)?;
    let mut inputs = vec![&window];
    inputs.extend(&select);
    let digests = out.writable(&inputs)?;
    let (window, select) = (window.bytes(), select.as_ref().map(Memory::bytes));
    Ok(py.detach(|| merkle::hash_leaves(window, leaf_bytes, first_leaf, select, digests))?)
}

#[pyfunction]
fn hash_leaves_at(
    py: Python<'_>,
    window: &Bound<'_, PyAny>,
    leaf_bytes: usize,
    numbers: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (window, numbers) = (Memory::get("window", window)?, Memory::get("numbers", numbers)?);
    let mut out = Memory::get("out", out)?;
    let digests = out.writable(&[&window, &numbers])?;
    let (window, numbers) = (window.bytes(), numbers.bytes());
    Ok(py.detach(|| merkle::hash_leaves_at(window, leaf_bytes, numbers, digests))?)
}

#[pyfunction]
fn hash_node<'py>(py: Python<'py>, children: &Bound<'py, PyAny>, level: u32) -> PyResult<Bound<'py, PyBytes>> {
    let children = Memory::get("children", children)?;
    let children = children.bytes();
    let digest = py.detach(|| merkle::hash_node(children, level))?;
    Ok(PyBytes::new(py, &digest))
}

#[pyfunction]
fn encode_extents<'py>(py: Python<'py>, rows: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    let rows = Memory::get("rows", rows)?;
    let rows = rows.bytes();
    let encoded = py.detach(|| extents::encode(rows))?;
    Ok(PyBytes::new(py, &encoded))
}

#[pyfunction]
fn decode_extents<'py>(py: Python<'py>, encoded: &Bound<'py, PyAny>, max_rows: usize) -> PyResult<Bound<'py, PyBytes>> {
    let encoded = Memory::get("encoded", encoded)?;
    let encoded = encoded.bytes();
    let rows = py.detach(|| extents::decode(encoded, max_rows))?;
    Ok(PyBytes::new(py, &rows))
}

#[pyfunction(name = "overlay")]
fn overlay_extents<'py>(
    py: Python<'py>,
    lower: &Bound<'py, PyAny>,
    upper: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyBytes>> {
    let (lower, upper) = (Memory::get("lower", lower)?, Memory::get("upper", upper)?);
    let (lower, upper) = (lower.bytes(), upper.bytes());
    let pieces = py.detach(|| -> Result<Vec<u8>> {
        let (lower, upper) = (extents::rows(lower)?, extents::rows(upper)?);
        Ok(overlay::to_bytes(&overlay::overlay(&lower, &upper)))
    })?;
    Ok(PyBytes::new(py, &pieces))
}

#[pyfunction]
fn gather<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyAny>,
    sources: Vec<Bound<'py, PyAny>>,
    grain_bytes: usize,
) -> PyResult<Bound<'py, PyBytes>> {
    let rows = Memory::get("rows", rows)?;
    let held: Vec<Memory> = sources.iter().map(|source| Memory::get("source", source)).collect::<PyResult<_>>()?;
    let sources: Vec<&[u8]> = held.iter().map(Memory::bytes).collect();
    let (parts, total) = overlay::parts(rows.bytes(), &sources, grain_bytes)?;
    PyBytes::new_with(py, total, |payload| {
        py.detach(|| {
            let mut room = payload;
            for part in parts {
                let (to, rest) = room.split_at_mut(part.len());
                to.copy_from_slice(part);
                room = rest;
            }
        });
        Ok(())
    })
}

#[pyfunction(name = "crc32c", signature = (data, crc = 0))]
fn checksum(py: Python<'_>, data: &Bound<'_, PyAny>, crc: u32) -> PyResult<u32> {
    let data = Memory::get("data", data)?;
    let data = data.bytes();
    Ok(py.detach(|| crc32c::crc32c_append(crc, data)))
}

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(scan_window, module)?)?;
    module.add_function(wrap_pyfunction!(zeros, module)?)?;
    module.add_function(wrap_pyfunction!(hash_leaves, module)?)?;
    module.add_function(wrap_pyfunction!(hash_leaves_at, module)?)?;
    module.add_function(wrap_pyfunction!(hash_node, module)?)?;
    module.add_function(wrap_pyfunction!(encode_extents, module)?)?;
    module.add_function(wrap_pyfunction!(decode_extents, module)?)?;
    module.add_function(wrap_pyfunction!(overlay_extents, module)?)?;
    module.add_function(wrap_pyfunction!(gather, module)?)?;
    module.add_function(wrap_pyfunction!(checksum, module)?)
}
