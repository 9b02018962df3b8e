"""Which kernel, how many programs, which tile: plain functions of shapes, strides and the device. Nothing here touches a device.

A tensor shaped like the logits is seen as [B, C, P]: batch, class, position. A row is one position: number b * P + p.
Long rows whose classes lie side by side go to a *rows* kernel: one program walks one row in 16-byte vectors. All else goes to a
*tiles* kernel: one program takes BLOCK_N positions and steps over their classes BLOCK_C at a time, one lane for each pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

VECTOR_BYTES = 16
LONG_ROW = 512  # classes from which on one program has enough to do with one row: two vectors of 16-bit numbers for each of 32 threads
SHORT_ROW = 1024
BLOCK = 4096  # classes of a long row in one step: two vectors of 16-bit numbers for each of 256 threads
TILE = 2048  # lanes of a tile: 16 for each of 128 threads keeps `top` and `total` in registers
FEW_CLASSES = 64
ROW_IN_REGISTERS = 16384  # classes that one thread block can keep: 32 for each of 512 threads
ONE_VISIT_BYTES = 64 << 20  # of logits: reading them again takes an H100 22 us (modelled), the small launches of one visit as long
ELEMENTS = 2048  # of an elementwise program: 16 for each of 128 threads
SPLIT_FROM = 4 * BLOCK  # a row shorter than this is not worth a second launch
LIMIT = 1 << 31  # programs, positions and classes are counted in int32; everything else is int64
MOST_CLASSES = LIMIT - 4 * BLOCK  # whatever a loop over the classes steps to, or a plan rounds them up to, is still in int32


class Device(NamedTuple):
    processors: int
    warp: int  # threads
    clusters: bool = False  # thread blocks can read each other's shared memory


class Strides(NamedTuple):
    """Of a tensor shaped like the logits, in elements."""

    batch: int
    class_: int
    position: int


class Walk(NamedTuple):
    """What a kernel knows of the way over the logits."""

    classes: int
    positions: int
    strides: Strides  # of the logits


class View(NamedTuple):
    """The one shape of a launch's tensors, and the strides of each."""

    batch: int
    classes: int
    positions: int
    strides: tuple[Strides, ...]

    @property
    def rows(self) -> int:
        return self.batch * self.positions

    @property
    def way(self) -> Walk:
        return Walk(self.classes, self.positions, self.strides[0])


def view(shape: Sequence[int], *strides: Sequence[int]) -> View:
    """[N, C] or [B, C, P] as [B, C, P], with as much as possible in P: the N rows of [N, C] are positions of one batch entry."""
    if len(shape) == 2:
        batch, classes, positions = 1, shape[1], shape[0]
        seen = [Strides(0, s[1], s[0]) for s in strides]
    else:
        batch, classes, positions = shape
        seen = [Strides(*s) for s in strides]
    if classes > MOST_CLASSES:
        raise RuntimeError(f"the CUDA kernels can count {MOST_CLASSES} classes, not {classes}: use torch.nn.functional for these")
    if classes == 1:
        seen = [s._replace(class_=1) for s in seen]
    if positions == 1:
        seen = [s._replace(position=s.batch) for s in seen]
    if batch * positions < LIMIT and all(batch == 1 or s.batch == positions * s.position for s in seen):
        batch, positions, seen = 1, batch * positions, [s._replace(batch=0) for s in seen]
    return View(batch, classes, positions, tuple(seen))


@dataclass(frozen=True)
class RowsPlan:
    """One program for each `chunk` classes of a row. VEC elements are one aligned vector in every tensor, or 1."""

    rows: int
    splits: int
    chunk: int
    VEC: int
    BLOCK_C: int
    num_warps: int

    @property
    def programs(self) -> int:
        return self.rows * self.splits


@dataclass(frozen=True)
class OneVisitPlan:
    """One program for each row, in `num_ctas` thread blocks. VEC elements are one aligned vector in every tensor."""

    rows: int
    VEC: int
    BLOCK_C: int
    num_warps: int
    num_ctas: int


@dataclass(frozen=True)
class TilesPlan:
    """One program for each BLOCK_N positions; the kernels that take one step only also have one for each BLOCK_C classes."""

    programs: int
    class_tiles: int
    BLOCK_N: int
    BLOCK_C: int
    num_warps: int

    @property
    def elementwise_programs(self) -> int:
        return self.programs * self.class_tiles


def class_stride(weight_stride: int) -> int | None:
    """The stride of a class weight as the kernels want it: None for one number for all classes."""
    return weight_stride or None


def power_of_two_from(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def has_long_rows(v: View) -> bool:
    return v.classes >= LONG_ROW and all(s.class_ == 1 for s in v.strides)


def takes_rows(v: View, weight_stride: int | None) -> bool:
    """The same for kernels that read a class weight beside each logit: tiles read both in vectors where rows are aligned anyway. Beside
    rows that start anywhere, weights are read one by one."""
    aligned = all(n % 16 == 0 for s in v.strides for n in (v.classes, s.batch, s.position))
    return has_long_rows(v) and (weight_stride is None or not aligned)


def vector(v: View, itemsize: int) -> int:
    """How many classes make a vector that is aligned in every tensor at once: rows may start anywhere, but all alike."""
    vec = VECTOR_BYTES // itemsize
    first, *others = v.strides
    alike = all((s.batch - first.batch) % vec == 0 and (s.position - first.position) % vec == 0 for s in others)
    return vec if alike else 1


def whole_rows(v: View, itemsize: int, device: Device) -> RowsPlan:
    """Each row in one program."""
    block = _block(v, itemsize)
    chunk = ceil_div(v.classes, block) * block
    return RowsPlan(v.rows, 1, chunk, vector(v, itemsize), block, _warps_of(block, itemsize, device))


def forward_rows(v: View, itemsize: int, device: Device) -> RowsPlan:
    """Each row in one program, or split over several when there are too few rows to fill the device."""
    block = _block(v, itemsize)
    splits = 1
    if v.classes >= SPLIT_FROM and v.rows < 2 * device.processors:
        splits = min(ceil_div(4 * device.processors, v.rows), ceil_div(v.classes, 2 * block))
    chunk = ceil_div(ceil_div(v.classes, splits), block) * block  # whole blocks: an odd chunk would end in a masked step
    return RowsPlan(v.rows, ceil_div(v.classes, chunk), chunk, vector(v, itemsize), block, _warps_of(block, itemsize, device))


def backward_rows(v: View, itemsize: int, device: Device) -> RowsPlan:
    """Four blocks of a row in one program, so that its start costs little beside them; one where that leaves the device idle."""
    block = _block(v, itemsize)
    chunk = 4 * block if v.rows * ceil_div(v.classes, 4 * block) >= 16 * device.processors else block
    return RowsPlan(v.rows, ceil_div(v.classes, chunk), chunk, vector(v, itemsize), block, _warps_of(block, itemsize, device))


def _block(v: View, itemsize: int) -> int:
    return min(BLOCK * 2 // max(2, itemsize), power_of_two_from(v.classes))


def _warps_of(block: int, itemsize: int, device: Device) -> int:
    """Two vectors for each thread; four in short rows, of whose numbers every warp computes its own copy."""
    return warps(block * itemsize // (64 if block <= SHORT_ROW else 32), device)


def one_visit(v: View, itemsize: int, device: Device, clusters: bool) -> OneVisitPlan | None:
    """For a row that waits in registers. None if it is too short or too long, or its vectors do not start alike in every tensor; a
    cluster wants rows of whole aligned vectors."""
    vec, aligned = vector(v, itemsize), v.classes % 16 == 0 and all(s.batch % 16 == s.position % 16 == 0 for s in v.strides)
    block = power_of_two_from(v.classes)
    num_ctas = max(1, block // ROW_IN_REGISTERS)
    fits = num_ctas == 1 or (num_ctas <= 16 and clusters and device.clusters and aligned)
    if not has_long_rows(v) or vec == 1 or itemsize > 4 or not fits:
        return None
    return OneVisitPlan(v.rows, vec, block, max(1, block // num_ctas // (32 * device.warp)), num_ctas)


def tiles(v: View, device: Device, lanes: int = TILE) -> TilesPlan:
    """For one step. Lanes along the dimension that lies side by side in memory; along both where it is short."""
    classes, positions = power_of_two_from(v.classes), power_of_two_from(v.positions)
    if v.strides[0].class_ <= v.strides[0].position:
        block_c = min(classes, lanes)
        block_n = min(positions, lanes // block_c)
    else:
        # enough positions for whole cache lines, and classes to share what is read for each position
        block_n = min(positions, max(128, lanes // classes))
        block_c = min(classes, lanes // block_n)
    return _tiles_of(v, device, block_n, block_c)


def looping_tiles(v: View, device: Device, lanes: int = TILE) -> TilesPlan:
    """For a loop over the classes."""
    if v.strides[0].class_ <= v.strides[0].position:
        return tiles(v, device, lanes)
    classes, positions = power_of_two_from(v.classes), power_of_two_from(v.positions)
    block_n = min(positions, lanes // 4)
    while block_n > 32 and v.batch * ceil_div(v.positions, block_n) < device.processors:
        block_n //= 2
    return _tiles_of(v, device, block_n, min(classes, lanes // block_n))


def reading_tiles(v: View, device: Device, lanes: int = TILE) -> TilesPlan:
    """For a loop that writes nothing. Few classes are then one lane's own: neighbours share cache lines, and nothing is merged."""
    if v.classes <= FEW_CLASSES and v.strides[0].class_ <= v.strides[0].position:
        return _tiles_of(v, device, min(power_of_two_from(v.positions), 256), 1)
    return looping_tiles(v, device, lanes)


def _tiles_of(v: View, device: Device, block_n: int, block_c: int) -> TilesPlan:
    programs = v.batch * ceil_div(v.positions, block_n)
    return TilesPlan(programs, ceil_div(v.classes, block_c), block_n, block_c, warps(min(128, block_n * block_c // 2), device))


ElementStrides = tuple[int, int, int] | None  # None: one number for all elements


class Elements(NamedTuple):
    """What an elementwise kernel knows of the way over [A, B, P]."""

    b: int
    p: int


@dataclass(frozen=True)
class ElementsPlan:
    """An elementwise launch over [A, B, P] with as much as possible in P: one program for each BLOCK_B by BLOCK_P elements."""

    shape: tuple[int, int, int]
    strides: tuple[ElementStrides, ...]
    BLOCK_B: int
    BLOCK_P: int

    @property
    def programs(self) -> int:
        a, b, p = self.shape
        return a * ceil_div(b, self.BLOCK_B) * ceil_div(p, self.BLOCK_P)

    @property
    def way(self) -> Elements:
        return Elements(self.shape[1], self.shape[2])


def elements(shape: Sequence[int], *strides: Sequence[int]) -> ElementsPlan:
    """Neighbouring dimensions become one where every tensor allows it: contiguous tensors become one long line."""
    dims = [(n, tuple(s[i] for s in strides)) for i, n in enumerate(shape) if n != 1]
    merged: list[tuple[int, tuple[int, ...]]] = []
    for n, step in dims:
        if merged and merged[-1][0] * n < LIMIT and all(outer == n * inner for outer, inner in zip(merged[-1][1], step, strict=True)):
            merged[-1] = (merged[-1][0] * n, step)
        else:
            merged.append((n, step))
    merged = [(1, (0,) * len(strides))] * (3 - len(merged)) + merged
    sizes = (merged[0][0], merged[1][0], merged[2][0])
    steps = tuple((merged[0][1][i], merged[1][1][i], merged[2][1][i]) for i in range(len(strides)))
    block_p = min(power_of_two_from(sizes[2]), ELEMENTS)
    return ElementsPlan(sizes, tuple(s if any(s) else None for s in steps), min(power_of_two_from(sizes[1]), ELEMENTS // block_p), block_p)


def warps(threads: int, device: Device) -> int:
    return max(1, min(256, threads) // device.warp)
