# SPDX-License-Identifier: MIT
r"""Orthogonal layers of any width, of which only what is asked for is drawn.

The layers are those of `orthogonal`, ``W_l = eps_l Q_l`` with independent Haar isometries, exactly in
law; but no d x d array is made, and the closure of a target needs no array of length d.

**Layers.** Q_l is a block of a Haar orthogonal matrix Qh_l of size n = max(d_l, d_{l-1}): the smaller side
is the first coordinates of R^n, the rest of R^n on that side is *virtual*. What is known of Qh_l is a pair
of orthonormal frames, ``Qh P = R`` and ``Qh^T R = P``. Given that, the image of a k-frame orthogonal to P
is uniform among the k-frames orthogonal to R, whatever the question was that led to it.

**Nodes.** Node l, between layers l and l + 1, holds an orthonormal frame F_l of p_l *abstract* directions,
and P and R are coordinates in F_{l-1}, F_l and the layer's virtual directions. An image, normalised
columns of an n x k Gaussian Z outside R, has the known directions' coordinates, which are drawn, and
parts in the unknown of the node and of the virtual space. Such a part of dimension N is Q T, an N x k
Gaussian factorised: Q is a uniform frame, the new abstract directions, independent of T; and T is
triangular with chi-distributed diagonal, N, N - 1, .. degrees of freedom, and normal entries above
(Bartlett). So small matrices are all that is drawn.

**Vectors.** A direction is given (a column of the target's singular vectors, or what is new in a vector
that a layer was applied to), or fresh: uniform in the complement of the node's earlier directions, and
drawn when a concrete vector is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .._problem.low_rank import check_orthonormal
from .._support.arrays import FloatArray, as_matrix, check_count, random_generator
from .._support.errors import ShapeError
from .._support.haar import signed_q
from .widths import Scale, check_distribution

#: The part of a unit vector outside what is known counts as rounding up to this many eps. A direction
#: kept in excess costs a little memory, one that is missing costs accuracy: hence close to rounding.
_ROUNDING = 64.0
#: Fresh directions are drawn in groups of about this size; a few temporaries are as large.
_GROUP_BYTES = 2**25
#: Rows of long vectors that inner products sum at a time.
_SUMMED_ROWS = 2**13
#: A Gaussian block this many times as tall as wide has a condition number below 2.
_TALL = 16

_F64 = np.dtype(np.float64)


@dataclass(frozen=True)
class ImplicitClosure:
    """The smallest subspaces that the layers carry to one another, in coordinates of their own frames.

    ``Q_l F_{l-1}`` lies in the span of F_l and ``Q_l^T F_l`` in that of F_{l-1}. The frames themselves are
    ``weights.basis(l, dims[l])``.

    Attributes
    ----------
    dims : tuple of int
        a_0 .. a_L, the dimensions; where `closed` is false, those reached.
    cores : tuple of ndarray
        ``F_l^T Q_l F_{l-1}``, a_l x a_{l-1}, without the scales; empty where `closed` is false.
    right, left : ndarray, shapes (a_0, r) and (a_L, r')
        V and U in coordinates of F_0 and F_L.
    closed : bool
        False where a limit was exceeded first.
    """

    dims: tuple[int, ...]
    cores: tuple[FloatArray, ...]
    right: FloatArray
    left: FloatArray
    closed: bool


class ImplicitWeights:
    r"""The layers ``W_l = eps_l Q_l``, ``Q_l`` independent Haar isometries, revealed by questions.

    Parameters
    ----------
    widths : sequence of int
        ``d_0, .., d_L``; layer l is ``d_l x d_{l-1}``.
    scale : float or sequence of float
        ``eps``, for all layers or one per layer.
    seed : int
        Non-negative, below 2**64.
    dtype : dtype
        float64 or float32: precision of concrete vectors. Coordinates are float64.

    Attributes
    ----------
    widths : tuple of int
    scales : tuple of float
    seed : int
    dtype : dtype
    n_layers : int
        L, also ``len(weights)``.

    Raises
    ------
    ShapeError
        If there are fewer than two widths, or not one scale per layer.
    ValueError
        For a width below 1, a negative scale or a seed out of range.

    Notes
    -----
    **The law is that of** `orthogonal` **whatever is asked, in whatever order; the numbers depend on the
    order of the questions.** The same seed and the same sequence of questions give the same numbers, and
    all answers of one object agree with each other to rounding. A seed's layers are not those that
    `orthogonal` draws from it.

    What was revealed is kept: k new columns of a d x d layer cost about 2 d k numbers, one vector and its
    image each, and O(d p k) time, p the directions that the nodes hold already.

    Examples
    --------
    >>> import numpy as np
    >>> from dlnfast import ImplicitWeights
    >>> weights = ImplicitWeights([10**9] * 4, scale=0.1, seed=1)
    >>> closure = weights.close(5, 5, limit=[100] * 4)
    >>> closure.dims, closure.closed
    ((10, 10, 10, 10), True)
    >>> small = ImplicitWeights([4, 4, 2], scale=0.5)
    >>> image = small.apply(1, np.ones((4, 1)))
    >>> bool(abs(small.apply_transpose(1, image) - 0.25).max() < 1e-15)
    True
    """

    def __init__(
        self,
        widths: Sequence[int],
        scale: Scale = 1.0,
        seed: int = 0,
        *,
        dtype: npt.DTypeLike = np.float64,
    ) -> None:
        sizes, scales, self.dtype = check_distribution(widths, scale, dtype)
        self.widths = tuple(sizes)
        self.scales = tuple(float(eps) for eps in scales)
        self.n_layers = len(scales)
        self._nodes = [
            _Node(dim, self.dtype, _Streams(seed, ("implicit node", i))) for i, dim in enumerate(sizes)
        ]
        self._layers = [
            _Layer(self._nodes[i], self._nodes[i + 1], _Streams(seed, ("implicit layer", i + 1)))
            for i in range(self.n_layers)
        ]
        self._frame_streams = _Streams(seed, ("implicit frame",))
        self._n_frames = 0
        self.seed = int(seed)

    def __len__(self) -> int:
        """Return L, the number of layers."""
        return self.n_layers

    def __repr__(self) -> str:
        """Return the widths, seed, precision and what is known."""
        known = [node.count for node in self._nodes]
        return (
            f"ImplicitWeights({list(self.widths)}, seed={self.seed}, {self.dtype}, directions known: {known})"
        )

    def describe(self) -> dict[str, Any]:
        """Return what defines the law and its seed, in values that JSON knows."""
        return {
            "widths": list(self.widths),
            "scales": list(self.scales),
            "seed": self.seed,
            "dtype": self.dtype.name,
        }

    # ------------------------------------------------------------------------------------- the closure

    def close(
        self,
        right: npt.ArrayLike | int | None,
        left: npt.ArrayLike | int | None,
        limit: Callable[[int], int] | Sequence[int] | int,
    ) -> ImplicitClosure:
        r"""Reveal the smallest subspaces that hold V and U and that all layers and transposes preserve.

        Parameters
        ----------
        right : array_like, shape (d_0, r), int or None
            V, orthonormal columns, kept by reference where it is a C-contiguous array: it must not change
            afterwards. An int stands for a uniformly random frame of that many columns, of which nothing
            is drawn; None for 0.
        left : array_like, shape (d_L, r'), int or None
            U, likewise.
        limit : int, sequence of int, or function of the node
            Largest dimension allowed, at all nodes or at each of 0 .. L.

        Returns
        -------
        ImplicitClosure
            With `closed` false, and no cores, where a node exceeded its limit: after a bulge
            ``d_0 < d > d_L`` the closure is the whole space.

        Raises
        ------
        ShapeError
            For frames that do not fit the widths, or not one limit per node.
        ValueError
            For columns that are not orthonormal.

        Notes
        -----
        With V and U the target's singular vectors and white inputs, these are the active subspaces of
        gradient descent. Dimensions for rank r, in wide layers: 2r at every node if all are square;
        [2r, 3r, .., 3r] for a smaller d_0, [3r, 2r, .., 2r] for a larger one; [2r, .., 2r, r] for d_L = r.

        O(L r^3) time and O(L r^2) memory, whatever the widths (O(d r^2) to check a frame that is given).

        Best called first. Directions known from other questions become part of the closure, as if
        they were columns of V and U, and if V or U is given as an array, all directions known at its node
        are drawn.
        """
        limits = self._limits(limit)
        frames = self._checked(0, right, "right"), self._checked(self.n_layers, left, "left")
        first, last = self._known(0, frames[0]), self._known(self.n_layers, frames[1])
        closed = self._grow(limits)
        dims = tuple(node.count for node in self._nodes)
        return ImplicitClosure(
            dims,
            tuple(layer.core() for layer in self._layers) if closed else (),
            _padded(first, dims[0]),
            _padded(last, dims[-1]),
            closed,
        )

    def _limits(self, limit: Callable[[int], int] | Sequence[int] | int) -> list[int]:
        n_nodes = self.n_layers + 1
        if callable(limit):
            values = [limit(node) for node in range(n_nodes)]
        elif isinstance(limit, Iterable):
            values = list(limit)
        else:
            values = [limit] * n_nodes
        if len(values) != n_nodes:
            raise ShapeError(f"limit has {len(values)} values; wanted one per node 0 .. L ({n_nodes})")
        return [check_count(value, f"limit[{i}]", minimum=0) for i, value in enumerate(values)]

    def _checked(self, index: int, frame: npt.ArrayLike | int | None, name: str) -> FloatArray | int:
        """Return a frame or a rank that fits the node."""
        dim = self.widths[index]
        if frame is None or isinstance(frame, (bool, int, np.integer)):
            return check_count(0 if frame is None else frame, name, minimum=0, maximum=dim)
        return check_orthonormal(as_matrix(frame, name, shape=(dim, None), empty=True), name)

    def _known(self, index: int, frame: FloatArray | int) -> FloatArray:
        """Make a frame known at a node, or draw a uniform one of that rank, and return its coordinates."""
        if isinstance(frame, int):
            self._n_frames += 1
            return _Side(self._nodes[index], 0).answer(frame, self._frame_streams[self._n_frames])
        return self._nodes[index].add_frame(frame)

    def _grow(self, limits: Sequence[int]) -> bool:
        """Apply all layers up and down until nothing new appears; False once a limit is exceeded."""
        while not all(layer.complete for layer in self._layers):
            if self._exceeded(limits):
                return False
            for layer in self._layers:
                layer.complete_side(layer.right, layer.left)
                if self._exceeded(limits):
                    return False
            for layer in reversed(self._layers):
                layer.complete_side(layer.left, layer.right)
                if self._exceeded(limits):
                    return False
        return not self._exceeded(limits)

    def _exceeded(self, limits: Sequence[int]) -> bool:
        return any(node.count > limit for node, limit in zip(self._nodes, limits, strict=True))

    # --------------------------------------------------------------------------------- concrete vectors

    def basis(self, node: int, k: int | None = None) -> FloatArray:
        """Return the known directions of a node as vectors.

        Parameters
        ----------
        node : int
            0 .. L.
        k : int, optional
            Only the first k. Directions keep their order: after a first `close`, its ``dims[node]`` come
            first, and V's or U's before all others.

        Returns
        -------
        ndarray, shape (d_node, k)
            Orthonormal columns. Read-only: it is what later answers are computed from.

        Notes
        -----
        O(d k^2) time for directions that were not drawn yet. Memory: the array, and about 100 MB meanwhile.
        """
        index = check_count(node, "node", minimum=0, maximum=self.n_layers)
        known = self._nodes[index].count
        return self._nodes[index].basis(known if k is None else check_count(k, "k", minimum=0, maximum=known))

    def apply(self, layer: int, X: npt.ArrayLike) -> FloatArray:
        """Return ``W_l X``.

        Parameters
        ----------
        layer : int
            l, from 1.
        X : array_like, shape (d_{l-1}, k)

        Returns
        -------
        ndarray, shape (d_l, k)

        Notes
        -----
        Draws all directions that nodes l - 1 and l hold. O((d_{l-1} + d_l) (p + k) k) time, p the
        directions known.
        """
        index = self._index(layer)
        return self._times(index, X, self._layers[index].right, self._layers[index].left, "X")

    def apply_transpose(self, layer: int, Y: npt.ArrayLike) -> FloatArray:
        """Return ``W_l^T Y``, shape (d_{l-1}, k), for Y of shape (d_l, k); see `apply`."""
        index = self._index(layer)
        return self._times(index, Y, self._layers[index].left, self._layers[index].right, "Y")

    def column(self, layer: int, j: int) -> FloatArray:
        """Return column j (from 0) of W_l, shape (d_l,)."""
        return self.apply(layer, self._unit(self.widths[self._index(layer)], j, "j"))[:, 0]

    def row(self, layer: int, i: int) -> FloatArray:
        """Return row i (from 0) of W_l, shape (d_{l-1},)."""
        return self.apply_transpose(layer, self._unit(self.widths[self._index(layer) + 1], i, "i"))[:, 0]

    def entry(self, layer: int, i: int, j: int) -> float:
        """Return entry (i, j) of W_l, from column j."""
        rows = self.widths[self._index(layer) + 1]
        position = check_count(i, "i", minimum=0, maximum=rows - 1)
        return float(self.column(layer, j)[position])

    def dense(self, layer: int) -> FloatArray:
        """Return W_l as an array of shape (d_l, d_{l-1}); O(d^3) time, for small widths."""
        index = self._index(layer)
        cols, rows = self.widths[index : index + 2]
        if cols <= rows:
            return self.apply(layer, np.eye(cols, dtype=self.dtype))
        return np.ascontiguousarray(self.apply_transpose(layer, np.eye(rows, dtype=self.dtype)).T)

    def _index(self, layer: int) -> int:
        return check_count(layer, "layer", maximum=self.n_layers) - 1

    def _unit(self, dim: int, position: int, name: str) -> FloatArray:
        vector = np.zeros((dim, 1), dtype=self.dtype)
        vector[check_count(position, name, minimum=0, maximum=dim - 1)] = 1.0
        return vector

    def _times(self, index: int, X: npt.ArrayLike, source: _Side, target: _Side, name: str) -> FloatArray:
        block = as_matrix(X, name, shape=(source.node.dim, None), dtype=self.dtype, empty=True)
        coordinates = source.node.coordinates(block)
        self._layers[index].reveal(source, target, coordinates, self.dtype)
        return target.node.combine(self.scales[index] * target.image(source, coordinates))


class _Streams:
    """Independent generators of one use, by their number: 2**128 counter values apart."""

    def __init__(self, seed: object, use: Sequence[int | str]) -> None:
        bits = random_generator(seed, use).bit_generator
        assert isinstance(bits, np.random.Philox)
        self._bits = bits

    def __getitem__(self, number: int) -> np.random.Generator:
        return np.random.Generator(self._bits.jumped(number))


class _Node:
    """The frame of one node: `count` directions, of which a first part is there as vectors."""

    def __init__(self, dim: int, dtype: np.dtype[Any], streams: _Streams) -> None:
        self.dim = dim
        self.dtype = dtype
        self.count = 0
        self._streams = streams
        self._blocks: list[FloatArray] = []

    @property
    def _drawn(self) -> int:
        return sum(block.shape[1] for block in self._blocks)

    def add_frame(self, frame: FloatArray) -> FloatArray:
        """Make an orthonormal frame known and return its coordinates."""
        if self.count:
            return self.coordinates(frame)
        self.count = frame.shape[1]
        self._blocks = [frame]
        return np.eye(self.count)

    def coordinates(self, X: FloatArray) -> FloatArray:
        """Return the coordinates of `X` in the frame, to which what is new in `X` is added."""
        self._draw(self.count)
        new = _new_directions(X, self._blocks, self.dim - self.count, _tolerance(self.dtype))
        if new.shape[1]:
            self._blocks.append(np.ascontiguousarray(new, dtype=self.dtype))
            self.count += new.shape[1]
        return np.vstack([np.empty((0, X.shape[1])), *(_inner(block, X) for block in self._blocks)])

    def combine(self, coordinates: FloatArray) -> FloatArray:
        """Return the vectors that have these coordinates."""
        self._draw(self.count)
        total = np.zeros((self.dim, coordinates.shape[1]), dtype=self.dtype)
        start = 0
        for block in self._blocks:
            stop = start + block.shape[1]
            total += _combined(block, coordinates[start:stop])
            start = stop
        return total

    def basis(self, count: int) -> FloatArray:
        """Return the first `count` directions."""
        self._draw(count)
        n_blocks, held = 0, 0
        while held < count:
            held += self._blocks[n_blocks].shape[1]
            n_blocks += 1
        if n_blocks == 1 and held == count and self._blocks[0].dtype == self.dtype:
            result = self._blocks[0].view()
        else:
            result = np.empty((self.dim, count), dtype=self.dtype)
            start = 0
            for block in self._blocks[:n_blocks]:
                stop = min(start + block.shape[1], count)
                result[:, start:stop] = block[:, : stop - start]
                start = stop
            if held == count > 0:  # one copy of these directions is enough
                self._blocks[:n_blocks] = [result]
                result = result.view()
        result.flags.writeable = False
        return result

    def _draw(self, count: int) -> None:
        """Draw the directions up to `count`, each uniform in the complement of those before it."""
        first = self._drawn
        if count <= first:
            return
        block = np.empty((self.dim, count - first), dtype=self.dtype)
        group = max(1, _GROUP_BYTES // (self.dtype.itemsize * self.dim))
        for start in range(0, count - first, group):
            stop = min(start + group, count - first)
            part: FloatArray = np.empty((self.dim, stop - start), dtype=self.dtype, order="F")
            for i in range(start, stop):
                part[:, i - start] = self._streams[first + i].standard_normal(self.dim)
            tall = self.dim - first - stop >= _TALL * (stop - start)
            for _ in range(2):  # the second round removes what rounding, amplified by the first, left
                part = _outside(part, [*self._blocks, block[:, :start]])
                part = _cholesky_q(part) if tall else signed_q(part)
            block[:, start:stop] = part
        self._blocks.append(block)


class _Side:
    """One side of a layer: its node, its virtual directions and the known frame (P or R) in both.

    Parameters
    ----------
    node : _Node
    n_virtual : int
        Dimension of the virtual space, ``n - node.dim``.
    """

    def __init__(self, node: _Node, n_virtual: int) -> None:
        self.node = node
        self.n_virtual = n_virtual
        self.virtual = 0  # virtual directions known
        self.asked = 0  # leading directions of the node that lie in the known frame's span
        self._frame: FloatArray = np.zeros((0, 0))
        self._n_real = 0  # the first rows of _frame belong to the node

    def frame(self) -> FloatArray:
        """Return the known frame in coordinates of all directions known by now, the node's first."""
        new_real = self.node.count - self._n_real
        new_virtual = self.virtual - (self._frame.shape[0] - self._n_real)
        if new_real or new_virtual:
            n_pairs = self._frame.shape[1]
            above, below = self._frame[: self._n_real], self._frame[self._n_real :]
            zeros = np.zeros((new_real, n_pairs)), np.zeros((new_virtual, n_pairs))
            self._frame = np.vstack([above, zeros[0], below, zeros[1]])
            self._n_real = self.node.count
        return self._frame

    def append(self, columns: FloatArray) -> None:
        """Add columns, orthogonal to the known frame, to it."""
        self._frame = np.hstack([self.frame(), columns])

    def answer(self, count: int, generator: np.random.Generator) -> FloatArray:
        """Return a uniform frame outside the known one, and make the directions known that it needs."""
        p, v = self.node.count, self.virtual
        known = generator.standard_normal((p + v, count))
        real = _triangle(self.node.dim - p, count, generator)
        virtual = _triangle(self.n_virtual - v, count, generator)
        self.node.count += real.shape[0]
        self.virtual += virtual.shape[0]
        image = np.vstack([known[:p], real, known[p:], virtual])
        for _ in range(2):  # the second round removes what rounding, amplified by the first, left
            image = signed_q(_outside(image, [self.frame()]))
        return image

    def image(self, source: _Side, coordinates: FloatArray) -> FloatArray:
        """Return, in the node's coordinates, the image of `coordinates` that the pairs of frames give."""
        inner = source.frame()[: source.node.count].T @ coordinates
        return self.frame()[: self.node.count] @ inner


class _Layer:
    """What is known of one orthogonal Qh: it carries the frame of its right side to that of its left side."""

    def __init__(self, right: _Node, left: _Node, streams: _Streams) -> None:
        self._n = max(right.dim, left.dim)
        self._streams = streams
        self.right = _Side(right, self._n - right.dim)
        self.left = _Side(left, self._n - left.dim)

    @property
    def complete(self) -> bool:
        """Whether the images of all directions of both nodes are known."""
        return all(side.asked == side.node.count for side in (self.right, self.left))

    def complete_side(self, source: _Side, target: _Side) -> None:
        """Reveal the images of all directions of the source's node."""
        known, asked = source.node.count, source.asked
        if known > asked:
            self.reveal(source, target, np.eye(known, known - asked, -asked), _F64)
            source.asked = known

    def reveal(self, source: _Side, target: _Side, coordinates: FloatArray, dtype: np.dtype[Any]) -> None:
        """Make the image known of vectors in the source's node, given to the precision of `dtype`."""
        frame = source.frame()
        n_pairs = frame.shape[1]
        question = _padded(coordinates, frame.shape[0])
        new = _new_directions(question, [frame], self._n - n_pairs, _tolerance(dtype))
        if new.shape[1]:
            image = target.answer(new.shape[1], self._streams[n_pairs])
            source.append(new)
            target.append(image)

    def core(self) -> FloatArray:
        """Return ``F_l^T Q F_{l-1}`` where all images are known."""
        return self.left.image(self.right, np.eye(self.right.node.count))


def _triangle(dim: int, count: int, generator: np.random.Generator) -> FloatArray:
    """Draw R of the QR factorisation of a dim x count Gaussian matrix, without the matrix (Bartlett)."""
    rows = min(dim, count)
    upper = np.triu(generator.standard_normal((rows, count)), 1)
    diagonal = np.arange(rows)
    upper[diagonal, diagonal] = np.sqrt(generator.chisquare(dim - diagonal))
    return upper


def _new_directions(X: FloatArray, known: Sequence[FloatArray], room: int, tolerance: float) -> FloatArray:
    """Return an orthonormal basis, at most `room` columns, of what `X` has outside the known frames.

    Gram-Schmidt in the order of the columns, so that rounding cannot turn the result as it turns the
    vectors of equal singular values.
    """
    size = np.abs(X).max(axis=0, initial=0.0)
    rest = X[:, size > 0] / size[size > 0]
    rest = rest / np.linalg.norm(rest, axis=0)
    found: FloatArray = rest[:, :0]
    while rest.shape[1] and found.shape[1] < room:
        frames = [*known, found]
        rest = _outside(_outside(rest, frames), frames)
        rest = rest[:, np.linalg.norm(rest, axis=0) > tolerance]
        if not rest.shape[1]:
            break
        part = signed_q(rest)
        leads = np.zeros(rest.shape[1], dtype=bool)
        leads[: part.shape[1]] = np.einsum("ij,ij->j", part, rest[:, : part.shape[1]]) > tolerance
        leads[:1] = True
        if not leads.all():
            part = signed_q(rest[:, leads])
        part = signed_q(_outside(part, frames))
        found = np.hstack([found, part[:, : room - found.shape[1]]])
        rest = rest[:, ~leads]
    return found


def _outside(X: FloatArray, frames: Sequence[FloatArray]) -> FloatArray:
    """Return `X` less its projections on orthonormal frames, in the precision of `X`."""
    rest = X
    for frame in frames:
        rest = rest - _combined(frame, _inner(frame, rest)).astype(X.dtype, copy=False)
    return rest


def _inner(frame: FloatArray, X: FloatArray) -> FloatArray:
    """Return ``frame.T @ X`` in float64, from sums over pieces: serial sums of 1e6 terms lose digits."""
    total = np.zeros((frame.shape[1], X.shape[1]))
    for start in range(0, X.shape[0], _SUMMED_ROWS):
        rows = slice(start, start + _SUMMED_ROWS)
        total += frame[rows].T.astype(_F64, copy=False) @ X[rows].astype(_F64, copy=False)
    return total


def _combined(frame: FloatArray, coordinates: FloatArray) -> FloatArray:
    """Return ``frame @ coordinates``, column by column: the BLAS is ten times slower on thin rows."""
    result: FloatArray = (coordinates.T.astype(frame.dtype, copy=False) @ frame.T).T
    return result


def _cholesky_q(matrix: FloatArray) -> FloatArray:
    """Return `signed_q` of a matrix that is far from singular, several times faster where it is tall."""
    lower = np.linalg.cholesky(_inner(matrix, matrix))
    return _combined(matrix, np.linalg.inv(lower).T)


def _padded(X: FloatArray, rows: int) -> FloatArray:
    """Return `X` with rows of zeros added, so that it has as many as `rows`."""
    return np.vstack([X, np.zeros((rows - X.shape[0], X.shape[1]))])


def _tolerance(dtype: np.dtype[Any]) -> float:
    return _ROUNDING * float(np.finfo(dtype).eps)
