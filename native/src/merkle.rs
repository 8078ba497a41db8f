//! Digests of the Merkle tree: BLAKE3 in derive-key mode, one context per kind of input.
//!
//! A leaf's digest covers its index and length, so that equal data at two places has
//! two digests and leaves cannot be swapped; a node's covers its level. What is all
//! zero has the digest of 32 zero bytes without any hashing, which is what keeps the
//! tree of a sparse disk sparse. (BLAKE3 has no input whose digest is all zero that
//! anybody could find.)
#![forbid(unsafe_code)]

use crate::error::{refuse, same_length, Result};
use crate::grain::{check_piece, is_zero, MAX_PIECE_BYTES};
use blake3::hazmat::{hash_derive_key_context, ContextKey, HasherExt};
use blake3::Hasher;
use std::sync::LazyLock;

pub const DIGEST_BYTES: usize = 32;
pub const FAN_OUT: usize = 256;
pub const MAX_LEAVES: u64 = 1 << 32;
pub const MAX_LEVEL: u32 = 4;

const LEAF_CONTEXT: &str = "replica 2026-11 merkle leaf v1";
const NODE_CONTEXT: &str = "replica 2026-11 merkle node v1";

static LEAF_KEY: LazyLock<ContextKey> = LazyLock::new(|| hash_derive_key_context(LEAF_CONTEXT));
static NODE_KEY: LazyLock<ContextKey> = LazyLock::new(|| hash_derive_key_context(NODE_CONTEXT));
static PADDING: [u8; 4096] = [0; 4096];

pub type Digest = [u8; DIGEST_BYTES];

/// The digest of a leaf that is not all zero; `data` may be short and counts as zero-padded.
fn leaf_digest(data: &[u8], leaf_bytes: usize, index: u64) -> Digest {
    let mut hasher = Hasher::new_from_context_key(&LEAF_KEY);
    hasher.update(data);
    let mut missing = leaf_bytes.saturating_sub(data.len());
    while missing > 0 {
        let part = PADDING.get(..missing).unwrap_or(&PADDING);
        hasher.update(part);
        missing -= part.len();
    }
    hasher.update(&index.to_le_bytes());
    hasher.update(&(leaf_bytes as u32).to_le_bytes());
    hasher.finalize().into()
}

/// Digest the selected leaves of a window (all of them without `select`); `out` keeps the rest.
pub fn hash_leaves(
    window: &[u8],
    leaf_bytes: usize,
    first_leaf: u64,
    select: Option<&[u8]>,
    out: &mut [u8],
) -> Result<()> {
    check_piece("leaf", leaf_bytes)?;
    const { assert!(MAX_PIECE_BYTES <= u32::MAX as usize) };
    let count = window.len().div_ceil(leaf_bytes);
    same_length("out", out.len(), count * DIGEST_BYTES)?;
    if let Some(select) = select {
        same_length("select", select.len(), count)?;
    }
    if first_leaf > MAX_LEAVES || count as u64 > MAX_LEAVES - first_leaf {
        return refuse(format!("leaves from {first_leaf} on, {count} of them: a tree has {MAX_LEAVES}"));
    }
    let mut chosen = select.map(<[u8]>::iter);
    for ((leaf, digest), index) in window.chunks(leaf_bytes).zip(out.chunks_exact_mut(DIGEST_BYTES)).zip(first_leaf..) {
        if let Some(chosen) = &mut chosen {
            if chosen.next() == Some(&0) {
                continue;
            }
        }
        if is_zero(leaf) {
            digest.fill(0);
        } else {
            digest.copy_from_slice(&leaf_digest(leaf, leaf_bytes, index));
        }
    }
    Ok(())
}

/// Digest leaves from anywhere in the disk, one behind the other in `window`: the n-th is leaf `numbers[n]` (u64).
pub fn hash_leaves_at(window: &[u8], leaf_bytes: usize, numbers: &[u8], out: &mut [u8]) -> Result<()> {
    check_piece("leaf", leaf_bytes)?;
    let count = window.len().div_ceil(leaf_bytes);
    same_length("numbers", numbers.len(), count * 8)?;
    same_length("out", out.len(), count * DIGEST_BYTES)?;
    let leaves = window.chunks(leaf_bytes).zip(numbers.chunks_exact(8));
    for ((leaf, number), digest) in leaves.zip(out.chunks_exact_mut(DIGEST_BYTES)) {
        let index = number.try_into().map_or(MAX_LEAVES, u64::from_le_bytes);
        if index >= MAX_LEAVES {
            return refuse(format!("leaf {index}: a tree has {MAX_LEAVES}"));
        }
        if is_zero(leaf) {
            digest.fill(0);
        } else {
            digest.copy_from_slice(&leaf_digest(leaf, leaf_bytes, index));
        }
    }
    Ok(())
}

/// The digest of a node from its 256 children; `level` is the node's own, 1 to 4.
pub fn hash_node(children: &[u8], level: u32) -> Result<Digest> {
    same_length("children", children.len(), FAN_OUT * DIGEST_BYTES)?;
    if !(1..=MAX_LEVEL).contains(&level) {
        return refuse(format!("a node at level {level}: 1 to {MAX_LEVEL} are there"));
    }
    if is_zero(children) {
        return Ok([0; DIGEST_BYTES]);
    }
    let mut hasher = Hasher::new_from_context_key(&NODE_KEY);
    hasher.update(children);
    hasher.update(&level.to_le_bytes());
    Ok(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(context: &str, parts: &[&[u8]]) -> Digest {
        let input: Vec<u8> = parts.concat();
        blake3::derive_key(context, &input)
    }

    #[test]
    fn leaves_are_the_digests_of_data_index_and_length() {
        let window: Vec<u8> = (0..3 * 16384 - 5000).map(|i: usize| (i % 251) as u8).collect();
        let mut out = [0; 96];
        hash_leaves(&window, 16384, 7, None, &mut out).unwrap();
        let mut padded = window.clone();
        padded.resize(3 * 16384, 0);
        for (i, leaf) in padded.chunks(16384).enumerate() {
            let index = (7 + i as u64).to_le_bytes();
            let wanted = naive("replica 2026-11 merkle leaf v1", &[leaf, &index, &16384u32.to_le_bytes()]);
            assert_eq!(out[i * 32..][..32], wanted);
        }
    }

    #[test]
    fn only_selected_leaves_are_touched_and_zero_is_zero() {
        let mut window = vec![0; 4 * 512];
        window[512] = 1;
        let mut out = [9; 128];
        hash_leaves(&window, 512, 0, Some(&[1, 1, 0, 2]), &mut out).unwrap();
        assert_eq!(out[..32], [0; 32]);
        assert!(out[32..64] != [9; 32] && out[32..64] != [0; 32]);
        assert_eq!(out[64..96], [9; 32]);
        assert_eq!(out[96..], [0; 32]);
    }

    #[test]
    fn scattered_leaves_have_the_digests_that_they_have_in_their_places() {
        let window: Vec<u8> = (0..3 * 512 - 100).map(|i: usize| (i % 251) as u8).collect();
        let numbers: Vec<u8> = [5u64, 9, 70_000].iter().flat_map(|number| number.to_le_bytes()).collect();
        let mut out = [0; 96];
        hash_leaves_at(&window, 512, &numbers, &mut out).unwrap();
        for (i, number) in [5u64, 9, 70_000].into_iter().enumerate() {
            let mut alone = [0; 32];
            let leaf = &window[i * 512..window.len().min((i + 1) * 512)];
            hash_leaves(leaf, 512, number, None, &mut alone).unwrap();
            assert_eq!(out[i * 32..][..32], alone);
        }
        assert!(hash_leaves_at(&window, 512, &numbers[8..], &mut out).is_err());
        assert!(hash_leaves_at(&window[..512], 512, &MAX_LEAVES.to_le_bytes(), &mut out[..32]).is_err());
        hash_leaves_at(&[0; 512], 512, &[0; 8], &mut out[..32]).unwrap();
        assert_eq!(out[..32], [0; 32]);
    }

    #[test]
    fn a_node_is_the_digest_of_children_and_level() {
        let mut children = vec![0; 8192];
        assert_eq!(hash_node(&children, 1).unwrap(), [0; 32]);
        children[8191] = 1;
        let wanted = naive("replica 2026-11 merkle node v1", &[&children, &3u32.to_le_bytes()]);
        assert_eq!(hash_node(&children, 3).unwrap(), wanted);
        assert_ne!(hash_node(&children, 2).unwrap(), wanted);
    }

    #[test]
    fn out_of_range_is_refused() {
        assert!(hash_node(&[0; 8191], 1).is_err());
        assert!(hash_node(&[0; 8192], 0).is_err());
        assert!(hash_node(&[0; 8192], 5).is_err());
        let (window, mut out) = ([1; 1024], [0; 64]);
        assert!(hash_leaves(&window, 512, MAX_LEAVES - 2, None, &mut out).is_ok());
        assert!(hash_leaves(&window, 512, MAX_LEAVES - 1, None, &mut out).is_err());
        assert!(hash_leaves(&window, 512, u64::MAX, None, &mut out).is_err());
        assert!(hash_leaves(&window, 512, 0, Some(&[1]), &mut out).is_err());
        assert!(hash_leaves(&window, 512, 0, None, &mut out[..63]).is_err());
    }
}
