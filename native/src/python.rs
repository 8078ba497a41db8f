//! The Python face of the kernels: foreign buffers in, slices out, `Refused` to `ValueError`, `Fault` to the
//! package's own errors.
//!
//! Buffers are taken as plain bytes, whatever their element type, if they are
//! C-contiguous; 64-bit numbers in them are little-endian. The GIL is released for
//! the work. Python may keep several views of the same memory, so a buffer that is
//! written must not overlap another argument (checked), and no other thread may write
//! to any of them during the call (the caller's duty, as for every kernel of numpy).
#![allow(unsafe_code)]

use crate::error::{refuse, Fault, Refused, Result};
use crate::seal::{Kind, Place, TAG_BYTES};
use crate::segment::{Opening, Sealing, Table};
use crate::{chunk, extents, grain, merkle, overlay, scan, seal, segment};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::ops::Range;

pyo3::import_exception!(replica.errors, DamageError);
pyo3::import_exception!(replica.errors, FormatError);

impl From<Refused> for PyErr {
    fn from(refused: Refused) -> PyErr {
        PyValueError::new_err(refused.0)
    }
}

impl From<Fault> for PyErr {
    fn from(fault: Fault) -> PyErr {
        match fault {
            Fault::Damaged(message) => DamageError::new_err(message),
            Fault::Malformed(message) => FormatError::new_err(message),
            Fault::Refused(refused) => refused.into(),
        }
    }
}

/// New `bytes` of that length, written by `fill` without the GIL (`PyBytes::new_with` touches all of them with it).
fn bytes_of<'py, T: Send, E: Into<PyErr> + Send>(
    py: Python<'py>,
    length: usize,
    fill: impl FnOnce(&mut [u8]) -> Result<T, E> + Send,
) -> PyResult<(Bound<'py, PyBytes>, T)> {
    let size = ffi::Py_ssize_t::try_from(length)?;
    // SAFETY: returns a new `bytes` of that length, not yet written, or NULL with an exception set.
    let bytes: Bound<'py, PyAny> =
        unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyBytes_FromStringAndSize(std::ptr::null(), size))? };
    // SAFETY: `bytes` is one; the address stays valid while it lives.
    let start = unsafe { ffi::PyBytes_AsString(bytes.as_ptr()) } as usize;
    let value = py.detach(|| {
        // SAFETY: `length` bytes at `start` belong to `bytes`, which nobody else knows yet; zeroed, they are initialised.
        let room = unsafe {
            std::ptr::write_bytes(start as *mut u8, 0, length);
            std::slice::from_raw_parts_mut(start as *mut u8, length)
        };
        fill(room)
    });
    Ok((bytes.cast_into::<PyBytes>()?, value.map_err(Into::into)?))
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
    let (payload, ()) = bytes_of(py, total, |mut room| -> Result<()> {
        for part in parts {
            let (to, rest) = room.split_at_mut(part.len());
            to.copy_from_slice(part);
            room = rest;
        }
        Ok(())
    })?;
    Ok(payload)
}

#[pyfunction(name = "crc32c", signature = (data, crc = 0))]
fn checksum(py: Python<'_>, data: &Bound<'_, PyAny>, crc: u32) -> PyResult<u32> {
    let data = Memory::get("data", data)?;
    let data = data.bytes();
    Ok(py.detach(|| crc32c::crc32c_append(crc, data)))
}

/// Seals and opens in one delta file.
#[pyclass(frozen, module = "replica._native")]
struct Cipher(seal::Cipher);

#[pymethods]
impl Cipher {
    #[new]
    fn new(key: &[u8], header_digest: &[u8], name: String) -> PyResult<Cipher> {
        Ok(Cipher(seal::Cipher::new(key, header_digest, name)?))
    }

    #[pyo3(signature = (kind, segment, chunk, data, raw_bytes, flags = 0))]
    #[allow(clippy::too_many_arguments)]
    fn seal<'py>(
        &self,
        py: Python<'py>,
        kind: u32,
        segment: u32,
        chunk: u32,
        data: &Bound<'py, PyAny>,
        raw_bytes: u32,
        flags: u32,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let place = Place { kind: Kind::of(kind)?, segment, chunk, raw_bytes, flags };
        let data = Memory::get("data", data)?;
        let data = data.bytes();
        let (sealed, ()) = bytes_of(py, data.len() + TAG_BYTES, |room| {
            room.split_at_mut(data.len()).0.copy_from_slice(data);
            self.0.seal(place, room)
        })?;
        Ok(sealed)
    }

    #[pyo3(signature = (kind, segment, chunk, sealed, raw_bytes, flags = 0))]
    #[allow(clippy::too_many_arguments)]
    fn open<'py>(
        &self,
        py: Python<'py>,
        kind: u32,
        segment: u32,
        chunk: u32,
        sealed: &Bound<'py, PyAny>,
        raw_bytes: u32,
        flags: u32,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let place = Place { kind: Kind::of(kind)?, segment, chunk, raw_bytes, flags };
        let sealed = Memory::get("sealed", sealed)?;
        let sealed = sealed.bytes();
        let (plain, ()) =
            bytes_of(py, sealed.len().saturating_sub(TAG_BYTES), |room| self.0.open(place, sealed, room))?;
        Ok(plain)
    }

    fn seal_segment<'py>(
        &self,
        py: Python<'py>,
        number: u32,
        disk: u32,
        extents: &Bound<'py, PyAny>,
        payload: &Bound<'py, PyAny>,
        level: i32,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let (extents, payload) = (Memory::get("extents", extents)?, Memory::get("payload", payload)?);
        let (extents, payload) = (extents.bytes(), payload.bytes());
        let sealing = py.detach(|| Sealing::new(number, disk, extents, payload, level))?;
        let (blob, digest) = bytes_of(py, sealing.blob_bytes(), |room| sealing.write(&self.0, room))?;
        Ok((blob, PyBytes::new(py, &digest)))
    }

    fn open_table<'py>(
        &self,
        py: Python<'py>,
        number: u32,
        sealed: &Bound<'py, PyAny>,
        blob_bytes: usize,
    ) -> PyResult<(u32, Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let sealed = Memory::get("sealed", sealed)?;
        let sealed = sealed.bytes();
        let table = py.detach(|| Table::open(&self.0, number, sealed, blob_bytes))?;
        Ok((table.disk, PyBytes::new(py, &table.rows()), PyBytes::new(py, &table.extents)))
    }

    fn open_chunk<'py>(
        &self,
        py: Python<'py>,
        number: u32,
        index: u32,
        row: (u32, u32, u32),
        sealed: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (raw_bytes, flags, sealed_bytes) = row;
        let row = chunk::Row { raw_bytes, flags, sealed_bytes };
        let sealed = Memory::get("sealed", sealed)?;
        let sealed = sealed.bytes();
        if !row.is_possible(true) || sealed.len() != sealed_bytes as usize {
            refuse(format!("{row:?} of {} bytes", sealed.len()))?;
        }
        let (raw, ()) =
            bytes_of(py, raw_bytes as usize, |room| chunk::open(&self.0, number, index, row, sealed, room))?;
        Ok(raw)
    }

    fn open_segment<'py>(
        &self,
        py: Python<'py>,
        number: u32,
        blob: &Bound<'py, PyAny>,
        table_bytes: usize,
        grain_bytes: u64,
    ) -> PyResult<(u32, Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let blob = Memory::get("blob", blob)?;
        let blob = blob.bytes();
        let opening = py.detach(|| Opening::new(&self.0, number, blob, table_bytes, grain_bytes))?;
        let (payload, ()) = bytes_of(py, opening.table.payload_bytes(), |room| opening.write(&self.0, room))?;
        Ok((opening.table.disk, PyBytes::new(py, &opening.table.extents), payload))
    }
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
    module.add_function(wrap_pyfunction!(checksum, module)?)?;
    module.add("SEGMENT_RAW_BYTES", segment::RAW_BYTES)?;
    module.add("MAX_EXTENTS", segment::MAX_EXTENTS)?;
    module.add("MAX_CHUNKS", segment::MAX_CHUNKS)?;
    module.add("TAG_BYTES", TAG_BYTES)?;
    module.add_class::<Cipher>()
}
