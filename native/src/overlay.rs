//! One table of extents laid over another, and the payload that results.
//!
//! `overlay` answers, for two tables applied one after the other, which of them has
//! the last word on every grain: where both cover one, the upper wins and the lower
//! is split. Each piece remembers its source (0 lower, 1 upper) and, for data, where
//! in that source's payload its grains begin; `gather` then copies them together.
//! This is the inner step of compose and of reading through a chain.
#![forbid(unsafe_code)]

use crate::error::{refuse, Refused, Result};
use crate::extents::{groups, Kind, Row};
use crate::grain::check_piece;

pub const LOWER: u64 = 0;
pub const UPPER: u64 = 1;

/// A part of a source's extent: five 64-bit numbers in memory, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub first: u64,
    pub count: u64,
    pub kind: Kind,
    pub source: u64,
    /// Data only, else 0: grains of the source's payload before this piece's.
    pub offset_grains: u64,
}

impl Piece {
    fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Cut in two at grain `at`, which lies inside: the part before it, and the rest.
    fn split(self, at: u64) -> (Piece, Piece) {
        let taken = at.saturating_sub(self.first).min(self.count);
        let moved = if self.kind == Kind::Data { taken } else { 0 };
        let rest = Piece {
            first: self.first + taken,
            count: self.count - taken,
            offset_grains: self.offset_grains + moved,
            ..self
        };
        (Piece { count: taken, ..self }, rest)
    }

    /// Whether `next` goes on where this ends; between grains that touch, no payload of their source lies either.
    fn continues(&self, next: &Piece) -> bool {
        self.end() == next.first && self.source == next.source && self.kind == next.kind
    }
}

/// A table's rows as pieces of `source`.
fn pieces(rows: &[Row], source: u64) -> impl Iterator<Item = Piece> + '_ {
    let mut payload = 0;
    rows.iter().map(move |row| {
        let grains = if row.kind == Kind::Data { row.count } else { 0 };
        let offset_grains = if grains > 0 { payload } else { 0 };
        payload += grains;
        Piece { first: row.first, count: row.count, kind: row.kind, source, offset_grains }
    })
}

fn push(out: &mut Vec<Piece>, piece: Piece) {
    match out.last_mut() {
        _ if piece.count == 0 => {}
        Some(last) if last.continues(&piece) => last.count += piece.count,
        _ => out.push(piece),
    }
}

/// `upper` laid over `lower`: ascending, disjoint, merged where one source goes on.
pub fn overlay(lower: &[Row], upper: &[Row]) -> Vec<Piece> {
    let mut out = Vec::with_capacity(lower.len() + upper.len());
    let mut below = pieces(lower, LOWER);
    let mut open = below.next();
    for top in pieces(upper, UPPER) {
        while let Some(piece) = open.filter(|piece| piece.first < top.end()) {
            let (before, rest) = piece.split(top.first);
            push(&mut out, before);
            let (_hidden, rest) = rest.split(top.end());
            open = if rest.count > 0 { Some(rest) } else { below.next() };
        }
        push(&mut out, top);
    }
    while let Some(piece) = open {
        push(&mut out, piece);
        open = below.next();
    }
    out
}

/// Pieces as they lie in memory.
pub fn to_bytes(pieces: &[Piece]) -> Vec<u8> {
    let numbers = |p: &Piece| [p.first, p.count, p.kind.mark(), p.source, p.offset_grains];
    pieces.iter().flat_map(numbers).flat_map(u64::to_le_bytes).collect()
}

/// The parts of the sources that `gather` puts together, checked, and their total length.
pub fn parts<'a>(table: &[u8], sources: &[&'a [u8]], grain_bytes: usize) -> Result<(Vec<&'a [u8]>, usize)> {
    check_piece("grain", grain_bytes)?;
    let in_bytes = |grains: u64| usize::try_from(grains).ok()?.checked_mul(grain_bytes);
    let mut total = 0usize;
    let mut parts = Vec::new();
    for [_, count, mark, source, offset] in groups::<5>("rows", table)? {
        if Kind::of(mark)? != Kind::Data {
            continue;
        }
        let payload = usize::try_from(source).ok().and_then(|index| sources.get(index));
        let Some(payload) = payload else {
            return refuse(format!("an extent of source {source}, but there are {}", sources.len()));
        };
        let part = in_bytes(offset)
            .zip(offset.checked_add(count).and_then(in_bytes))
            .and_then(|(start, stop)| payload.get(start..stop));
        let Some(part) = part else {
            return refuse(format!("grains {offset} + {count} of source {source}, which has {} bytes", payload.len()));
        };
        total = total.checked_add(part.len()).ok_or_else(|| Refused("a payload too large".into()))?;
        parts.push(part);
    }
    Ok((parts, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    const Z: Kind = Kind::Zero;
    const D: Kind = Kind::Data;
    const L: Kind = Kind::Lost;

    fn row(first: u64, count: u64, kind: Kind) -> Row {
        Row { first, count, kind }
    }

    fn piece(first: u64, count: u64, kind: Kind, source: u64, offset_grains: u64) -> Piece {
        Piece { first, count, kind, source, offset_grains }
    }

    #[test]
    fn the_upper_splits_the_lower() {
        let lower = [row(0, 2, D), row(10, 10, D), row(30, 5, Z), row(40, 9, L)];
        let upper = [row(1, 1, D), row(12, 3, Z), row(19, 12, D), row(42, 2, D), row(48, 3, L)];
        let wanted = [
            piece(0, 1, D, 0, 0),
            piece(1, 1, D, 1, 0),
            piece(10, 2, D, 0, 2),
            piece(12, 3, Z, 1, 0),
            piece(15, 4, D, 0, 7),
            piece(19, 12, D, 1, 1),
            piece(31, 4, Z, 0, 0),
            piece(40, 2, L, 0, 0),
            piece(42, 2, D, 1, 13),
            piece(44, 4, L, 0, 0),
            piece(48, 3, L, 1, 0),
        ];
        assert_eq!(overlay(&lower, &upper), wanted);
    }

    #[test]
    fn pieces_of_one_source_that_touch_become_one() {
        let rows = [row(0, 2, D), row(2, 3, D), row(5, 1, Z), row(6, 1, Z)];
        let wanted = |source| [piece(0, 5, D, source, 0), piece(5, 2, Z, source, 0)];
        assert_eq!(overlay(&rows, &[]), wanted(0));
        assert_eq!(overlay(&[], &rows), wanted(1));
        assert_eq!(overlay(&rows, &rows), wanted(1));
    }

    #[test]
    fn every_grain_is_the_uppers_or_the_lowers() {
        // All pairs of tables over six grains, by brute force.
        let tables: Vec<Vec<Row>> = (0..4u64.pow(6)).map(table_of).collect();
        for lower in tables.iter().step_by(17) {
            for upper in tables.iter().step_by(19) {
                let out = overlay(lower, upper);
                assert!(out.windows(2).all(|pair| pair[0].end() <= pair[1].first));
                let (low, high) = (by_grain(pieces(lower, 0)), by_grain(pieces(upper, 1)));
                let wanted: Vec<_> = high.iter().zip(&low).map(|(high, low)| high.or(*low)).collect();
                assert_eq!(by_grain(out.into_iter()), wanted);
            }
        }
    }

    fn table_of(mut number: u64) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        for grain in 0..6 {
            let kind = Kind::of((number % 4).wrapping_sub(1)).ok();
            number /= 4;
            match (rows.last_mut(), kind) {
                (_, None) => {}
                (Some(last), Some(kind)) if last.end() == grain && last.kind == kind => last.count += 1,
                (_, Some(kind)) => rows.push(row(grain, 1, kind)),
            }
        }
        rows
    }

    fn by_grain(pieces: impl Iterator<Item = Piece>) -> Vec<Option<(u64, u64, u64)>> {
        let mut grains = vec![None; 6];
        for piece in pieces {
            for i in 0..piece.count {
                let place = if piece.kind == D { piece.offset_grains + i } else { 0 };
                grains[(piece.first + i) as usize] = Some((piece.source, piece.kind.mark(), place));
            }
        }
        grains
    }

    #[test]
    fn gathers_only_what_is_there() {
        let (a, b) = ([1; 1024], [2; 512]);
        let sources = [a.as_slice(), b.as_slice()];
        let get = |pieces: &[Piece]| parts(&to_bytes(pieces), &sources, 512);
        let (found, total) = get(&[piece(0, 1, D, 1, 0), piece(1, 9, Z, 7, 9), piece(50, 1, D, 0, 1)]).unwrap();
        assert_eq!((found, total), (vec![b.as_slice(), &a[512..]], 1024));
        assert!(get(&[piece(0, 1, D, 2, 0)]).is_err());
        assert!(get(&[piece(0, 2, D, 1, 0)]).is_err());
        assert!(get(&[piece(0, 1, D, 1, 1)]).is_err());
        assert!(get(&[piece(0, u64::MAX, D, 0, 2)]).is_err());
        assert!(parts(&[0; 39], &sources, 512).is_err());
        assert!(parts(&[], &sources, 511).is_err());
    }
}
