"""Is this the same picture? A fingerprint small enough to keep of every image ever trained on, and the search for near-duplicates.

A fingerprint is the picture in 16 x 16 brightnesses and 8 x 8 colours. Two are near-duplicates if a slight crop and a change of brightness
explain nearly all of the difference; docs/adr/0012 says why, and what was measured.
Shapes: N fingerprints looked for, M looked through, P candidate pairs, B bytes of a fingerprint, S cells a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

LUMA_SIDE, CHROMA_SIDE = 16, 8
LUMA_BYTES, CHROMA_BYTES = LUMA_SIDE**2, CHROMA_SIDE**2
FINGERPRINT_BYTES = LUMA_BYTES + 2 * CHROMA_BYTES

NEAR = 0.1  # of the pictures' contrast may stay unexplained
COLOUR_WEIGHT = 0.25  # of a squared difference in colour: compression and clipping change colours most, and eyes see it least
NOISE = 1.0  # grey levels that rounding and compression add even to a picture without contrast
CANDIDATE_CORRELATION = 0.85
CANDIDATES = 32  # most alike ones of each picture that are looked at closely; it bounds the work where all pictures look alike
LARGEST_CROP = 0.045  # of a side, at either end
GAINS, OFFSETS = (0.7, 1.4), (-40.0, 40.0)
LARGEST_STRETCH = 0.1  # difference of the sides' ratios, as a natural logarithm
BLACK, WHITE = 1, 254  # brightness beyond is cut off, and says nothing of the gain
FIT_STEPS = 3
BLOCK_N, BLOCK_M, BLOCK_P = 2048, 16384, 2048

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Fingerprints, and the pictures' sizes in pixels."""

    fingerprints_NB: Bytes
    width_N: Ints
    height_N: Ints

    def __len__(self) -> int:
        return len(self.fingerprints_NB)

    def some(self, numbers: Ints) -> Pictures:
        """Those of these numbers."""
        return Pictures(self.fingerprints_NB[numbers], self.width_N[numbers], self.height_N[numbers])


@dataclass(frozen=True, eq=False)
class Pairs:
    """Near-duplicates: numbers in the two collections, and the distance (0: the same; NEAR: the limit)."""

    mine_P: Ints
    other_P: Ints
    distance_P: Floats


def fingerprint(image: Image.Image) -> bytes:
    """The fingerprint of an upright RGB image."""
    # Bilinear, since what its wide triangles give can be cropped by part of a cell afterwards; what boxes give cannot.
    small = image.resize((LUMA_SIDE, LUMA_SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0).convert("YCbCr")
    luma, blue, red = small.split()
    return luma.tobytes() + blue.reduce(2).tobytes() + red.reduce(2).tobytes()


def near_duplicates(mine: Pictures, others: Pictures) -> Pairs:
    """Each picture of `mine` with each of `others` that is a copy of it: encoded anew, resized, slightly cropped or brightened.

    Which of the two is the copy does not matter. Of each of `mine` only the CANDIDATES most alike others are looked at.
    """
    mine_P, other_P = _candidates(mine.fingerprints_NB, others.fingerprints_NB)
    stretch_P = np.abs(_log_ratio(mine)[mine_P] - _log_ratio(others)[other_P])
    mine_P, other_P = mine_P[stretch_P <= LARGEST_STRETCH], other_P[stretch_P <= LARGEST_STRETCH]
    blocks = range(0, len(mine_P), BLOCK_P)
    parts = [distances(mine.fingerprints_NB[mine_P[i : i + BLOCK_P]], others.fingerprints_NB[other_P[i : i + BLOCK_P]]) for i in blocks]
    distance_P = np.concatenate([np.zeros(0, np.float32), *parts])
    near_P = distance_P <= NEAR
    return Pairs(mine_P[near_P], other_P[near_P], distance_P[near_P])


def distances(a_PB: Bytes, b_PB: Bytes) -> Floats:
    """How much of each pair's contrast no crop and change of brightness explains, in whichever direction explains more."""
    a, b = _Planes.of(a_PB), _Planes.of(b_PB)
    contrast_P = np.maximum(a.contrast(), b.contrast())
    left_P = np.minimum(_unexplained(a, b), _unexplained(b, a))
    distance_P: Floats = np.maximum(left_P - NOISE, 0) / np.maximum(contrast_P, NOISE)
    return distance_P


@dataclass(frozen=True, eq=False)
class _Planes:
    """Fingerprints as numbers: brightness, and the two colours about grey."""

    luma_PSS: Floats
    chroma_PSSC: Floats

    @classmethod
    def of(cls, fingerprints_PB: Bytes) -> _Planes:
        values_PB = fingerprints_PB.astype(np.float32)
        chroma = values_PB[:, LUMA_BYTES:].reshape(-1, 2, CHROMA_SIDE, CHROMA_SIDE) - 128
        return cls(values_PB[:, :LUMA_BYTES].reshape(-1, LUMA_SIDE, LUMA_SIDE), np.moveaxis(chroma, 1, -1))

    def contrast(self) -> Floats:
        contrast_P: Floats = np.sqrt(self.luma_PSS.var((1, 2)) + COLOUR_WEIGHT * self.chroma_PSSC.var((1, 2)).sum(-1))
        return contrast_P


def _unexplained(a: _Planes, b: _Planes) -> Floats:
    """What is left of `b`, in grey levels, after the best that a crop of `a` with a change of brightness makes of it (Gauss-Newton)."""
    crop_P4 = np.zeros((len(a.luma_PSS), 4), np.float32)  # cut off at top, bottom, left and right
    best_P = np.full(len(a.luma_PSS), np.inf, np.float32)
    seen_PSS = ((b.luma_PSS > BLACK) & (b.luma_PSS < WHITE)).astype(np.float32)
    seen_PSS[seen_PSS.mean((1, 2)) < 0.2] = 1.0
    for step in range(FIT_STEPS + 1):
        cropped_PSS = _cropped(a.luma_PSS[..., None], crop_P4)[..., 0]
        tones_P2 = _fit(_tone_terms(cropped_PSS), b.luma_PSS - cropped_PSS, seen_PSS)
        gain_P, offset_P = np.clip(1 + tones_P2[:, 0], *GAINS), np.clip(tones_P2[:, 1], *OFFSETS)
        made_PSS = np.clip(cropped_PSS * gain_P[:, None, None] + offset_P[:, None, None], 0, 255)
        colours_PSSC = _cropped(a.chroma_PSSC, crop_P4) * gain_P[:, None, None, None]
        off_P = ((b.chroma_PSSC - colours_PSSC) ** 2).mean((1, 2)).sum(-1)
        left_P = ((b.luma_PSS - made_PSS) ** 2).mean((1, 2)) + COLOUR_WEIGHT * off_P
        best_P = np.minimum(best_P, left_P)
        if step < FIT_STEPS:
            terms = np.concatenate([_tone_terms(cropped_PSS), _crop_terms(cropped_PSS)], -1)
            change_P4 = _fit(terms, b.luma_PSS - cropped_PSS, seen_PSS)[:, 2:] / gain_P[:, None]
            crop_P4 = np.clip(crop_P4 + change_P4 * LARGEST_CROP, -LARGEST_CROP, LARGEST_CROP).astype(np.float32)
    unexplained_P: Floats = np.sqrt(best_P)
    return unexplained_P


def _tone_terms(luma_PSS: Floats) -> Floats:
    return np.stack([luma_PSS, np.ones_like(luma_PSS)], -1)


def _crop_terms(luma_PSS: Floats) -> Floats:
    """How the cells change with LARGEST_CROP more cut off at each side."""
    down_PSS, right_PSS = np.gradient(luma_PSS, axis=(1, 2))
    at = (np.arange(LUMA_SIDE, dtype=np.float32) + 0.5) / LUMA_SIDE
    y, x = at[None, :, None], at[None, None, :]
    moves = np.stack([down_PSS * (1 - y), -down_PSS * y, right_PSS * (1 - x), -right_PSS * x], -1)
    return moves * (LUMA_SIDE * LARGEST_CROP)


def _fit(terms_PSST: Floats, wanted_PSS: Floats, weight_PSS: Floats) -> Floats:
    """Least squares of each pair; the small ridge keeps flat pictures solvable."""
    pairs, terms = len(terms_PSST), terms_PSST.shape[-1]
    X = terms_PSST.reshape(pairs, -1, terms)
    weighted = (X * weight_PSS.reshape(pairs, -1, 1)).transpose(0, 2, 1)
    ridge = np.eye(terms, dtype=np.float32) * 100
    ridge[1, 1] = 0.01  # the offset's own unit is one grey level
    solved: Floats = np.linalg.solve(weighted @ X + ridge, weighted @ wanted_PSS.reshape(pairs, -1, 1))[..., 0]
    return solved


def _cropped(planes_PSSC: Floats, crop_P4: Floats) -> Floats:
    """The planes as they would be of the picture without so much of each side."""
    side = planes_PSSC.shape[1]
    rows_PSS, columns_PSS = _reading(side, crop_P4[:, 0], crop_P4[:, 1]), _reading(side, crop_P4[:, 2], crop_P4[:, 3])
    rows = rows_PSS @ planes_PSSC.reshape(len(planes_PSSC), side, -1)
    cropped: Floats = columns_PSS[:, None] @ rows.reshape(planes_PSSC.shape)
    return cropped


def _reading(side: int, before_P: Floats, after_P: Floats) -> Floats:
    """Matrices that read `side` cells between two cuts, by cubic interpolation (Catmull-Rom)."""
    centres = (np.arange(side, dtype=np.float32) + 0.5) / side
    at_PS = (before_P[:, None] + centres * (1 - before_P - after_P)[:, None]) * side - 0.5
    first_PS = np.floor(at_PS)
    t = at_PS - first_PS
    weights = (-t / 2 + t**2 - t**3 / 2, 1 - 2.5 * t**2 + 1.5 * t**3, t / 2 + 2 * t**2 - 1.5 * t**3, (t**3 - t**2) / 2)
    cells = np.arange(side)
    matrix_PSS = np.zeros((len(at_PS), side, side), np.float32)
    for number, weight_PS in enumerate(weights):
        cell_PS = np.clip(first_PS.astype(np.int64) + number - 1, 0, side - 1)
        matrix_PSS += weight_PS[:, :, None] * (cell_PS[:, :, None] == cells)
    return matrix_PSS


def _candidates(mine_NB: Bytes, other_MB: Bytes) -> tuple[Ints, Ints]:
    """The pairs whose 8 x 8 brightnesses go together, at most CANDIDATES of each of `mine`: one matrix product a block."""
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for n in range(0, len(mine_NB), BLOCK_N):
        mine_ND = _shape(mine_NB[n : n + BLOCK_N])
        floor_N = np.full(len(mine_ND), CANDIDATE_CORRELATION, np.float32)
        best: tuple[Ints, Ints, Floats] = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        for m in range(0, len(other_MB), BLOCK_M):
            correlation_NM = mine_ND @ _shape(other_MB[m : m + BLOCK_M]).T
            rows, columns = np.nonzero(correlation_NM >= floor_N[:, None])
            if len(rows):
                best = _best_of_each((
                    np.concatenate([best[0], rows]),
                    np.concatenate([best[1], columns + m]),
                    np.concatenate([best[2], correlation_NM[rows, columns]]),
                ))  # fmt: skip
                full, at = np.unique(best[0], return_index=True)
                last = np.append(at[1:], len(best[0])) - 1
                enough = last - at + 1 >= CANDIDATES
                floor_N[full[enough]] = best[2][last[enough]]
        found.append((best[0] + n, best[1]))
    return np.concatenate([rows for rows, _ in found]), np.concatenate([columns for _, columns in found])


def _best_of_each(pairs: tuple[Ints, Ints, Floats]) -> tuple[Ints, Ints, Floats]:
    """By row, best first, CANDIDATES a row."""
    order = np.lexsort((pairs[1], -pairs[2], pairs[0]))
    rows, columns, values = pairs[0][order], pairs[1][order], pairs[2][order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return rows[rank < CANDIDATES], columns[rank < CANDIDATES], values[rank < CANDIDATES]


def _shape(fingerprints_NB: Bytes) -> Floats:
    """The brightness in 8 x 8 cells, without its mean and strength: products of two are correlations."""
    half = LUMA_SIDE // 2
    cells = fingerprints_NB[:, :LUMA_BYTES].astype(np.float32).reshape(-1, half, 2, half, 2).mean((2, 4)).reshape(-1, half**2)
    cells -= cells.mean(1, keepdims=True)
    length = np.linalg.norm(cells, axis=1, keepdims=True)
    flat = length < NOISE * half  # a picture without contrast has no shape: it is like none
    shape: Floats = np.where(flat, 0, cells / np.maximum(length, 1e-6))
    return shape


def _log_ratio(pictures: Pictures) -> Floats:
    ratio: Floats = np.log(pictures.width_N / pictures.height_N)
    return ratio
