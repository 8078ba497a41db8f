//! Chunks: how a payload is cut, which pieces are compressed, and back.
//!
//! A chunk is 128, 64 or 32 KiB raw, chosen so that at most 32 KiB are sealed: well compressible data gets the ratio of
//! large frames, and a random read still opens little. The size to try next follows from the ratio just seen, with a
//! quarter to spare; what turns out too big is tried at half the size. (Measured on system files: 9 % of the bytes are
//! compressed twice; 18 % with a sixteenth to spare, for a ratio that is 0.4 % better.) A chunk that does not shrink is
//! stored.
//!
//! Noise costs next to nothing: behind a chunk that did not shrink, the next are stored *unasked* while a sample of
//! them, the first 512 bytes of every 4 KiB, has the byte frequencies of noise. Every 16th is asked all the same, for
//! what repeats and yet looks like noise. Each choice follows from the payload alone: equal payloads make equal chunks.
#![forbid(unsafe_code)]

use crate::error::{malformed, refuse, Fault, Refused, Result};
use crate::seal::{Cipher, Kind, Place, TAG_BYTES};
use std::cell::Cell;
use std::ops::Range;
use zstd_safe::{CCtx, CParameter, DCtx};

/// Raw bytes of a chunk that is not the last, largest first.
pub const RAW_BYTES: [usize; 3] = [LARGEST, MIDDLE, SMALLEST];
pub const LARGEST: usize = 128 << 10;
const MIDDLE: usize = 64 << 10;
const SMALLEST: usize = 32 << 10;
/// Most bytes that are sealed, without the tag.
pub const BODY_BYTES: usize = 32 << 10;

pub const STORED: u32 = 0;
pub const COMPRESSED: u32 = 1;

const SAMPLE_BYTES: usize = 512;
const SAMPLED_BYTES: usize = 4096;
/// Chunks in a row that are stored unasked.
const UNASKED: usize = 15;

/// A chunk to be sealed.
pub struct Piece<'a> {
    pub raw: &'a [u8],
    /// Where its frame lies in `Cut::frames`; None: it is stored.
    frame: Option<Range<usize>>,
}

/// A payload cut into chunks.
pub struct Cut<'a> {
    pub pieces: Vec<Piece<'a>>,
    frames: Vec<u8>,
}

impl Cut<'_> {
    /// Flags of a piece, and the bytes to seal.
    pub fn body<'a>(&'a self, piece: &Piece<'a>) -> (u32, &'a [u8]) {
        match piece.frame.clone().and_then(|range| self.frames.get(range)) {
            Some(frame) => (COMPRESSED, frame),
            None => (STORED, piece.raw),
        }
    }
}

/// zstd's contexts and room to work in: one for each thread, kept from call to call.
struct Codec {
    compressor: CCtx<'static>,
    level: Option<i32>,
    decompressor: DCtx<'static>,
    room: Vec<u8>,
}

thread_local! {
    static IDLE: Cell<Option<Codec>> = const { Cell::new(None) };
}

fn with_codec<T, E: From<Refused>>(work: impl FnOnce(&mut Codec) -> Result<T, E>) -> Result<T, E> {
    let mut codec = match IDLE.take() {
        Some(codec) => codec,
        None => Codec::new()?,
    };
    let outcome = work(&mut codec);
    IDLE.set(Some(codec));
    outcome
}

fn said(code: zstd_safe::ErrorCode) -> Refused {
    Refused(zstd_safe::get_error_name(code).into())
}

impl Codec {
    fn new() -> Result<Codec> {
        let (Some(compressor), Some(decompressor)) = (CCtx::try_create(), DCtx::try_create()) else {
            return refuse("no memory for zstd");
        };
        let room = vec![0; zstd_safe::compress_bound(LARGEST)];
        Ok(Codec { compressor, level: None, decompressor, room })
    }

    fn set_level(&mut self, level: i32) -> Result<()> {
        if self.level != Some(level) {
            self.compressor.set_parameter(CParameter::CompressionLevel(level)).map_err(said)?;
            self.level = Some(level);
        }
        Ok(())
    }

    fn compress(&mut self, raw: &[u8]) -> Result<&[u8]> {
        let length = self.compressor.compress2(self.room.as_mut_slice(), raw).map_err(said)?;
        self.room.get(..length).ok_or_else(|| Refused("a frame longer than its room".into()))
    }
}

/// The first bytes of `bytes`: as many as `length`, if there are.
fn front(bytes: &[u8], length: usize) -> &[u8] {
    bytes.split_at(length.min(bytes.len())).0
}

/// Whether a sample of `raw` has byte frequencies that noise could have.
///
/// Pearson's chi-squared over the 256 byte values is 255 ± 23 for noise, and grows by 2 n for every nat of entropy that
/// a sample of n bytes lacks. The limit, 512, is 11 deviations from noise; an eighth of text among noise is beyond it.
fn looks_like_noise(raw: &[u8]) -> bool {
    let (mut counts, mut sampled) = ([0u32; 256], 0u64);
    for part in raw.chunks(SAMPLED_BYTES) {
        for &byte in front(part, SAMPLE_BYTES) {
            if let Some(count) = counts.get_mut(usize::from(byte)) {
                *count += 1;
            }
        }
        sampled += part.len().min(SAMPLE_BYTES) as u64;
    }
    let squares: u64 = counts.iter().map(|&count| u64::from(count) * u64::from(count)).sum();
    squares * 256 < sampled * (sampled + 512)
}

/// Cut a payload, and compress at that level of zstd.
pub fn cut(payload: &[u8], level: i32) -> Result<Cut<'_>> {
    let mut cut = Cut { pieces: Vec::new(), frames: Vec::new() };
    with_codec(|codec| {
        codec.set_level(level)?;
        let (mut rest, mut size) = (payload, MIDDLE);
        let mut unasked = UNASKED;
        while !rest.is_empty() {
            let small = front(rest, SMALLEST);
            if unasked < UNASKED && looks_like_noise(small) {
                unasked += 1;
                cut.pieces.push(Piece { raw: small, frame: None });
                rest = rest.split_at(small.len()).1;
                continue;
            }
            let mut raw = front(rest, size);
            let frame = codec.compress(raw)?;
            let shrinks = frame.len() < raw.len();
            if frame.len() > BODY_BYTES && size > SMALLEST {
                if shrinks {
                    size /= 2;
                    continue;
                }
                raw = small;
            }
            size = RAW_BYTES
                .into_iter()
                .find(|size| size * frame.len() <= BODY_BYTES * raw.len() / 4 * 3)
                .unwrap_or(SMALLEST);
            let place = shrinks.then(|| {
                let start = cut.frames.len();
                cut.frames.extend_from_slice(frame);
                start..cut.frames.len()
            });
            unasked = if shrinks { UNASKED } else { 0 };
            cut.pieces.push(Piece { raw, frame: place });
            rest = rest.split_at(raw.len()).1;
        }
        Ok(())
    })?;
    Ok(cut)
}

/// A chunk's row in the table of its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub raw_bytes: u32,
    pub flags: u32,
    pub sealed_bytes: u32,
}

impl Row {
    /// Whether a writer may have made it; `last`: of the last chunk of a segment.
    pub fn is_possible(&self, last: bool) -> bool {
        let (raw, sealed) = (self.raw_bytes as usize, self.sealed_bytes as usize);
        let Some(body) = sealed.checked_sub(TAG_BYTES).filter(|body| (1..=BODY_BYTES).contains(body)) else {
            return false;
        };
        let sized = if last { (1..=LARGEST).contains(&raw) } else { RAW_BYTES.contains(&raw) };
        sized
            && match self.flags {
                STORED => body == raw,
                COMPRESSED => body < raw,
                _ => false,
            }
    }
}

/// Open a chunk of `segment` into `raw`, which has the `raw_bytes` of its row. The row must be possible.
pub fn open(cipher: &Cipher, segment: u32, chunk: u32, row: Row, sealed: &[u8], raw: &mut [u8]) -> Result<(), Fault> {
    let Row { raw_bytes, flags, .. } = row;
    let place = Place { kind: Kind::Chunk, segment, chunk, raw_bytes, flags };
    if flags == STORED {
        return cipher.open(place, sealed, raw);
    }
    let what = || format!("chunk {chunk} of segment {segment} of {}", cipher.name);
    with_codec(|codec| {
        let Some(frame) = codec.room.get_mut(..sealed.len().saturating_sub(TAG_BYTES)) else {
            return malformed(format!("{} has {} bytes", what(), sealed.len()));
        };
        cipher.open(place, sealed, frame)?;
        let broken = |why: &str| Fault::Malformed(format!("{} does not decompress: {why}", what()));
        let broke = |code| broken(zstd_safe::get_error_name(code));
        match zstd_safe::get_frame_content_size(frame) {
            Ok(size) if size == Some(raw.len() as u64) => {}
            Ok(_) => return malformed(format!("{} decompresses to another size than declared", what())),
            Err(_) => return Err(broken("no frame")),
        }
        if zstd_safe::find_frame_compressed_size(frame).map_err(broke)? != frame.len() {
            return Err(broken("the frame ends before its bytes do"));
        }
        match codec.decompressor.decompress(raw, frame).map_err(broke)? {
            length if length == raw.len() => Ok(()),
            length => Err(broken(&format!("{length} bytes came out"))),
        }
    })
}
