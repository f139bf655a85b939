# SPDX-License-Identifier: MIT
r"""`ImplicitWeights`: lazily sampled orthogonal layers of any width.

The layers have exactly the distribution of `orthogonal`: ``W_l = eps_l Q_l`` with independent Haar
isometries. But no d x d array is formed, and the closure of a target needs no array of length d.

**Layers.** Q_l is a block of a Haar orthogonal matrix Qh_l of size n = max(d_l, d_{l-1}): the smaller side
consists of the first coordinates of R^n, and the other coordinates of R^n on that side are *virtual*. The
known part of Qh_l is a pair of orthonormal frames with ``Qh P = R`` and ``Qh^T R = P``. Conditionally on it,
the image of a k-frame orthogonal to P is uniform among the k-frames orthogonal to R, whatever the query.

**Nodes.** Node l, between layers l and l + 1, has an orthonormal frame F_l of p_l *abstract* directions, and
P and R are coordinates in F_{l-1}, F_l and the layer's virtual directions. An image consists of normalised
columns of an n x k Gaussian matrix Z outside R. Its coordinates in the known directions are drawn. Its
component of dimension N in the unknown part of the node, or of the virtual space, is an N x k Gaussian matrix
Q T: Q is a uniform frame, the new abstract directions, and independent of T; T is triangular with
chi-distributed diagonal entries of N, N - 1, .. degrees of freedom and normal entries above (Bartlett). So
only small matrices are drawn.

**Vectors.** A direction is either an input (a column of the target's singular vectors, or the new component
of a vector to which a layer is applied), or fresh: uniform in the complement of the node's earlier
directions, and drawn when its vector is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._problem.low_rank import check_orthonormal
from .._support.arrays import FloatArray, as_matrix, check_count, random_generator
from .._support.errors import ShapeError
from .._support.haar import signed_q
from .widths import Scale, check_distribution

#: A component of a unit vector outside the known directions counts as rounding error up to this many eps. A
#: superfluous direction costs a little memory, a missing one costs accuracy: the limit is close to rounding.
_ROUNDING = 64.0
#: Size of the groups in which fresh directions are drawn; a few temporary arrays have this size too.
_GROUP_BYTES = 2**25
#: Number of rows of long vectors that an inner product sums at a time.
_ROWS_PER_SUM = 2**13
#: Ratio of rows to columns from which a Gaussian matrix has a condition number below 2.
_TALL = 16

_F64 = np.dtype(np.float64)


@dataclass(frozen=True)
class ImplicitClosure:
    """The smallest subspaces that hold V and U and that the layers map into one another.

    ``Q_l F_{l-1}`` lies in the span of F_l and ``Q_l^T F_l`` in that of F_{l-1}. The frames F_l themselves
    are ``weights.basis(l, dims[l])``.

    Attributes
    ----------
    dims : tuple of int
        Dimensions a_0 .. a_L; if `closed` is false, the dimensions at which the iteration stopped.
    cores : tuple of ndarray
        ``F_l^T Q_l F_{l-1}``, a_l x a_{l-1}, without the scales; empty if `closed` is false.
    right, left : ndarray, shapes (a_0, r) and (a_L, r')
        V and U in coordinates of F_0 and F_L.
    closed : bool
        Whether the subspaces were found within the limits.
    """

    dims: tuple[int, ...]
    cores: tuple[FloatArray, ...]
    right: FloatArray
    left: FloatArray
    closed: bool


class _KnownClosure(NamedTuple):
    """A closure that was found, for the same question later."""

    right: FloatArray
    left: FloatArray
    closure: ImplicitClosure
    #: Whether nothing had been queried before.
    is_first: bool

    def is_of(self, right: object, left: object) -> bool:
        """Return whether the closure is that of these frames."""
        return all(
            mine is other or (isinstance(other, np.ndarray) and np.array_equal(mine, other))
            for mine, other in ((self.right, right), (self.left, left))
        )


class ImplicitWeights:
    r"""Lazily sampled layers ``W_l = eps_l Q_l`` with independent Haar isometries ``Q_l``.

    Parameters
    ----------
    widths : sequence of int
        ``d_0, .., d_L``; layer l is ``d_l x d_{l-1}``.
    scale : float or sequence of float
        ``eps``, for all layers or one per layer.
    seed : int
        Seed, non-negative and below 2**64.
    dtype : dtype
        Precision of vectors, float64 or float32. Coordinates are always float64.

    Attributes
    ----------
    widths : tuple of int
        d_0 .. d_L.
    scales : tuple of float
        Scale eps of each layer.
    seed : int
        Seed of the weights.
    dtype : dtype
        Precision of vectors.
    n_layers : int
        L, also ``len(weights)``.

    Raises
    ------
    ShapeError
        If there are fewer than two widths, or the number of scales is not 1 or L.
    ValueError
        If a width is below 1, a scale is negative or the seed is out of range.

    Notes
    -----
    **The distribution is that of** `orthogonal` **for any sequence of queries; the numbers depend on the
    order of the queries.** The same seed and the same sequence of queries give the same numbers, and all
    results of one object are consistent with one another to rounding. The layers of a seed are not those that
    `orthogonal` draws from it.

    All sampled numbers are stored: k new columns of a d x d layer take about 2 d k numbers, one vector and
    its image each, and O(d p k) time, with p the number of known directions of the nodes.

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
        self._closures: list[_KnownClosure] = []
        self.seed = int(seed)

    def __len__(self) -> int:
        """Return L, the number of layers."""
        return self.n_layers

    def __repr__(self) -> str:
        """Return the widths, the seed, the precision and the numbers of known directions."""
        known = [node.count for node in self._nodes]
        return (
            f"ImplicitWeights({list(self.widths)}, seed={self.seed}, {self.dtype}, directions known: {known})"
        )

    def describe(self) -> dict[str, Any]:
        """Return the parameters of the distribution and the seed as JSON values."""
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
        r"""Find the smallest subspaces that hold V and U and that all layers and transposes preserve.

        Parameters
        ----------
        right : array_like, shape (d_0, r), int or None
            V, orthonormal columns. A C-contiguous array is not copied, and must not change afterwards. An int
            is the number of columns of a uniformly random frame, whose vectors are not drawn; None means 0.
        left : array_like, shape (d_L, r'), int or None
            U, in the same form as `right`.
        limit : int, sequence of int, or function of the node
            Largest allowed dimension, for all nodes or for each of 0 .. L.

        Returns
        -------
        ImplicitClosure
            If a node exceeds its limit, `closed` is false and there are no cores. For ``d_0 < d > d_L`` the
            closure is always the whole space.

        Raises
        ------
        ShapeError
            If a frame does not fit the widths, or the number of limits is not 1 or L + 1.
        ValueError
            If the columns of a frame are not orthonormal.

        Notes
        -----
        With V and U the target's singular vectors and white inputs, these are the active subspaces of
        gradient descent. Dimensions for rank r, in wide layers: 2r at every node if all are square;
        [2r, 3r, .., 3r] for a smaller d_0, [3r, 2r, .., 2r] for a larger one; [2r, .., 2r, r] for d_L = r.

        Cost: O(L r^3) time and O(L r^2) memory for any widths, and O(d r^2) to check the frame of an array.

        Call this method before any other. Directions that are known from other queries become part of the
        closure, like columns of V and U; and if V or U is an array, all known directions at its node are
        drawn. The same arrays give the same closure again, whatever was queried since.
        """
        limits = self._limits(limit)
        frames = self._check_frame(0, right, "right"), self._check_frame(self.n_layers, left, "left")
        known = next((known for known in self._closures if known.is_of(*frames)), None)
        if known is not None and all(a <= b for a, b in zip(known.closure.dims, limits, strict=True)):
            return known.closure
        is_first = not any(node.count for node in self._nodes)
        first, last = self._add_frame(0, frames[0]), self._add_frame(self.n_layers, frames[1])
        closed = self._grow(limits)
        dims = tuple(node.count for node in self._nodes)
        closure = ImplicitClosure(
            dims,
            tuple(layer.core() for layer in self._layers) if closed else (),
            _pad_rows(first, dims[0]),
            _pad_rows(last, dims[-1]),
            closed,
        )
        if closed and isinstance(frames[0], np.ndarray) and isinstance(frames[1], np.ndarray):
            self._closures.append(_KnownClosure(frames[0], frames[1], closure, is_first))
        return closure

    def is_determined_by(self, right: FloatArray, left: FloatArray) -> bool:
        """Return whether the first query was `close` with these frames, so that it draws the same again.

        Parameters
        ----------
        right, left : ndarray, shapes (d_0, r) and (d_L, r')
            V and U.

        Returns
        -------
        bool
        """
        return bool(self._closures) and self._closures[0].is_first and self._closures[0].is_of(right, left)

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

    def _check_frame(self, index: int, frame: npt.ArrayLike | int | None, name: str) -> FloatArray | int:
        """Check that a frame, or a number of columns, fits the node."""
        dim = self.widths[index]
        if frame is None or isinstance(frame, (bool, int, np.integer)):
            return check_count(0 if frame is None else frame, name, minimum=0, maximum=dim)
        return check_orthonormal(as_matrix(frame, name, shape=(dim, None), empty=True), name)

    def _add_frame(self, index: int, frame: FloatArray | int) -> FloatArray:
        """Add a frame to a node, or a uniformly random one of that many columns; return its coordinates."""
        if isinstance(frame, int):
            self._n_frames += 1
            return _Side(self._nodes[index], 0).draw_image(frame, self._frame_streams[self._n_frames])
        return self._nodes[index].add_frame(frame)

    def _grow(self, limits: Sequence[int]) -> bool:
        """Apply all layers and transposes until no new direction appears; return False beyond a limit."""
        if any(node.count > limit for node, limit in zip(self._nodes, limits, strict=True)):
            return False
        while not all(layer.is_complete for layer in self._layers):
            # Only the target of a layer grows, so a sweep is linear in L.
            for index, layer in enumerate(self._layers):
                layer.reveal_all(layer.right, layer.left)
                if layer.left.node.count > limits[index + 1]:
                    return False
            for index, layer in reversed(list(enumerate(self._layers))):
                layer.reveal_all(layer.left, layer.right)
                if layer.right.node.count > limits[index]:
                    return False
        return True

    # ----------------------------------------------------------------------------------------- vectors

    def basis(self, node: int, k: int | None = None) -> FloatArray:
        """Return the known directions of a node as vectors.

        Parameters
        ----------
        node : int
            Number of the node, 0 .. L.
        k : int, optional
            Number of directions; the first k. Default: all. The order of directions never changes: after a
            first `close`, the first ``dims[node]`` directions are those of the closure, and of these those of
            V or U come first.

        Returns
        -------
        ndarray, shape (d_node, k)
            Orthonormal columns. Read-only, because later results are computed from it.

        Raises
        ------
        TypeError, ValueError
            If `node` is not in 0 .. L, or `k` exceeds the number of known directions.

        Notes
        -----
        Cost: O(d k^2) time for directions that have not been drawn yet. Memory: the array, and about 100 MB
        temporarily.
        """
        index = check_count(node, "node", minimum=0, maximum=self.n_layers)
        known = self._nodes[index].count
        return self._nodes[index].basis(known if k is None else check_count(k, "k", minimum=0, maximum=known))

    def apply(self, layer: int, X: npt.ArrayLike) -> FloatArray:
        """Return ``W_l X``.

        Parameters
        ----------
        layer : int
            Number l of the layer, from 1.
        X : array_like, shape (d_{l-1}, k)
            Block of vectors as columns.

        Returns
        -------
        ndarray, shape (d_l, k)

        Notes
        -----
        Draws the vectors of all known directions at nodes l - 1 and l. Cost: O((d_{l-1} + d_l) (p + k) k)
        time, with p the number of known directions.
        """
        index = self._index(layer)
        return self._times(index, X, self._layers[index].right, self._layers[index].left, "X")

    def apply_transpose(self, layer: int, Y: npt.ArrayLike) -> FloatArray:
        """Return ``W_l^T Y``; see `apply`.

        Parameters
        ----------
        layer : int
            Number l of the layer, from 1.
        Y : array_like, shape (d_l, k)
            Block of vectors as columns.

        Returns
        -------
        ndarray, shape (d_{l-1}, k)
        """
        index = self._index(layer)
        return self._times(index, Y, self._layers[index].left, self._layers[index].right, "Y")

    def column(self, layer: int, j: int) -> FloatArray:
        """Return a column of W_l.

        Parameters
        ----------
        layer : int
            Number l of the layer, from 1.
        j : int
            Number of the column, from 0.

        Returns
        -------
        ndarray, shape (d_l,)
        """
        return self.apply(layer, self._unit(self.widths[self._index(layer)], j, "j"))[:, 0]

    def row(self, layer: int, i: int) -> FloatArray:
        """Return a row of W_l.

        Parameters
        ----------
        layer : int
            Number l of the layer, from 1.
        i : int
            Number of the row, from 0.

        Returns
        -------
        ndarray, shape (d_{l-1},)
        """
        return self.apply_transpose(layer, self._unit(self.widths[self._index(layer) + 1], i, "i"))[:, 0]

    def entry(self, layer: int, i: int, j: int) -> float:
        """Return an entry of W_l.

        Parameters
        ----------
        layer : int
            Number l of the layer, from 1.
        i, j : int
            Row and column, from 0.

        Returns
        -------
        float

        Raises
        ------
        TypeError, ValueError
            If an index is out of range.

        Notes
        -----
        Cost: that of a whole column.
        """
        rows = self.widths[self._index(layer) + 1]
        position = check_count(i, "i", minimum=0, maximum=rows - 1)
        return float(self.column(layer, j)[position])

    def dense(self, layer: int) -> FloatArray:
        """Return W_l as an array, for small widths.

        Parameters
        ----------
        layer : int
            Number l of the layer, from 1.

        Returns
        -------
        ndarray, shape (d_l, d_{l-1})

        Notes
        -----
        Cost: O(d^3) time.
        """
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
    """Independent random generators of one purpose, by number: 2**128 counter values apart."""

    def __init__(self, seed: object, purpose: Sequence[int | str]) -> None:
        bits = random_generator(seed, purpose).bit_generator
        assert isinstance(bits, np.random.Philox)
        self._bits = bits

    def __getitem__(self, number: int) -> np.random.Generator:
        return np.random.Generator(self._bits.jumped(number))


class _Node:
    """The frame of one node: `count` directions, of which the first ones have been drawn as vectors."""

    def __init__(self, dim: int, dtype: np.dtype[Any], streams: _Streams) -> None:
        self.dim = dim
        self.dtype = dtype
        self.count = 0
        self._streams = streams
        self._blocks: list[FloatArray] = []

    @property
    def _n_drawn(self) -> int:
        return sum(block.shape[1] for block in self._blocks)

    def add_frame(self, frame: FloatArray) -> FloatArray:
        """Add an orthonormal frame and return its coordinates."""
        if self.count:
            return self.coordinates(frame)
        self.count = frame.shape[1]
        self._blocks = [frame]
        return np.eye(self.count)

    def coordinates(self, X: FloatArray) -> FloatArray:
        """Add the new directions in `X` to the frame, and return the coordinates of `X` in it."""
        self._draw(self.count)
        new = _new_directions(X, self._blocks, self.dim - self.count, _tolerance(self.dtype))
        if new.shape[1]:
            self._blocks.append(np.ascontiguousarray(new, dtype=self.dtype))
            self.count += new.shape[1]
        return np.vstack([np.empty((0, X.shape[1])), *(_inner_products(block, X) for block in self._blocks)])

    def combine(self, coordinates: FloatArray) -> FloatArray:
        """Return the vectors with these coordinates."""
        self._draw(self.count)
        total = np.zeros((self.dim, coordinates.shape[1]), dtype=self.dtype)
        start = 0
        for block in self._blocks:
            stop = start + block.shape[1]
            total += _combine(block, coordinates[start:stop])
            start = stop
        return total

    def basis(self, count: int) -> FloatArray:
        """Return the first `count` directions."""
        self._draw(count)
        n_blocks, n_found = 0, 0
        while n_found < count:
            n_found += self._blocks[n_blocks].shape[1]
            n_blocks += 1
        if n_blocks == 1 and n_found == count and self._blocks[0].dtype == self.dtype:
            result = self._blocks[0].view()
        else:
            result = np.empty((self.dim, count), dtype=self.dtype)
            start = 0
            for block in self._blocks[:n_blocks]:
                stop = min(start + block.shape[1], count)
                result[:, start:stop] = block[:, : stop - start]
                start = stop
            if n_found == count > 0:  # store one copy of these directions only
                self._blocks[:n_blocks] = [result]
                result = result.view()
        result.flags.writeable = False
        return result

    def _draw(self, count: int) -> None:
        """Draw the first `count` directions, each uniform in the complement of the previous ones."""
        first = self._n_drawn
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
            for _ in range(2):  # twice is enough: the second round removes the rounding error of the first
                part = _project_out(part, [*self._blocks, block[:, :start]])
                part = _cholesky_q(part) if tall else signed_q(part)
            block[:, start:stop] = part
        self._blocks.append(block)


class _Side:
    """One side of a layer: its node, its virtual directions, and the known frame (P or R) in both.

    Parameters
    ----------
    node : _Node
    n_virtual : int
        Dimension of the virtual space, ``n - node.dim``.
    """

    def __init__(self, node: _Node, n_virtual: int) -> None:
        self.node = node
        self.n_virtual = n_virtual
        self.virtual = 0  # number of known virtual directions
        self.n_revealed = 0  # number of leading directions of the node in the span of the known frame
        self._frame: FloatArray = np.zeros((0, 0))
        self._n_real = 0  # number of leading rows of _frame that belong to the node

    def frame(self) -> FloatArray:
        """Return the known frame in coordinates of the node's directions, then of the virtual ones."""
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
        """Add columns that are orthogonal to the known frame."""
        self._frame = np.hstack([self.frame(), columns])

    def draw_image(self, count: int, generator: np.random.Generator) -> FloatArray:
        """Draw a uniform frame orthogonal to the known one, and add the new directions that it needs."""
        p, v = self.node.count, self.virtual
        known = generator.standard_normal((p + v, count))
        real = _draw_triangle(self.node.dim - p, count, generator)
        virtual = _draw_triangle(self.n_virtual - v, count, generator)
        self.node.count += real.shape[0]
        self.virtual += virtual.shape[0]
        image = np.vstack([known[:p], real, known[p:], virtual])
        for _ in range(2):  # twice is enough: the second round removes the rounding error of the first
            image = signed_q(_project_out(image, [self.frame()]))
        return image

    def image(self, source: _Side, coordinates: FloatArray) -> FloatArray:
        """Return the image of `coordinates` under the known part of the layer."""
        inner = source.frame()[: source.node.count].T @ coordinates
        return self.frame()[: self.node.count] @ inner


class _Layer:
    """The known part of one orthogonal Qh: it maps the frame of its right side to that of its left side."""

    def __init__(self, right: _Node, left: _Node, streams: _Streams) -> None:
        self._n = max(right.dim, left.dim)
        self._streams = streams
        self.right = _Side(right, self._n - right.dim)
        self.left = _Side(left, self._n - left.dim)

    @property
    def is_complete(self) -> bool:
        """Whether the images of all directions of both nodes are known."""
        return all(side.n_revealed == side.node.count for side in (self.right, self.left))

    def reveal_all(self, source: _Side, target: _Side) -> None:
        """Sample the images of all directions of the source's node."""
        known, n_revealed = source.node.count, source.n_revealed
        if known > n_revealed:
            self.reveal(source, target, np.eye(known, known - n_revealed, -n_revealed), _F64)
            source.n_revealed = known

    def reveal(self, source: _Side, target: _Side, coordinates: FloatArray, dtype: np.dtype[Any]) -> None:
        """Sample the images of vectors of the source's node; `coordinates` are accurate to eps of `dtype`."""
        frame = source.frame()
        n_pairs = frame.shape[1]
        vectors = _pad_rows(coordinates, frame.shape[0])
        new = _new_directions(vectors, [frame], self._n - n_pairs, _tolerance(dtype))
        if new.shape[1]:
            image = target.draw_image(new.shape[1], self._streams[n_pairs])
            source.append(new)
            target.append(image)

    def core(self) -> FloatArray:
        """Return ``F_l^T Q F_{l-1}``; all images have to be known."""
        return self.left.image(self.right, np.eye(self.right.node.count))


def _draw_triangle(dim: int, count: int, generator: np.random.Generator) -> FloatArray:
    """Draw R of the QR factorisation of a dim x count Gaussian matrix, but not the matrix (Bartlett)."""
    rows = min(dim, count)
    upper = np.triu(generator.standard_normal((rows, count)), 1)
    diagonal = np.arange(rows)
    upper[diagonal, diagonal] = np.sqrt(generator.chisquare(dim - diagonal))
    return upper


def _new_directions(X: FloatArray, known: Sequence[FloatArray], room: int, tolerance: float) -> FloatArray:
    """Return an orthonormal basis, of at most `room` columns, of the components of `X` outside the frames.

    Gram-Schmidt in the order of the columns. Unlike a singular value decomposition, whose vectors of equal
    values are arbitrary, it makes the result a continuous function of `X`.
    """
    size = np.abs(X).max(axis=0, initial=0.0)
    remainder = X[:, size > 0] / size[size > 0]
    remainder = remainder / np.linalg.norm(remainder, axis=0)
    found: FloatArray = remainder[:, :0]
    while remainder.shape[1] and found.shape[1] < room:
        frames = [*known, found]
        remainder = _project_out(_project_out(remainder, frames), frames)
        remainder = remainder[:, np.linalg.norm(remainder, axis=0) > tolerance]
        if not remainder.shape[1]:
            break
        part = signed_q(remainder)
        leads = np.zeros(remainder.shape[1], dtype=bool)
        leads[: part.shape[1]] = np.einsum("ij,ij->j", part, remainder[:, : part.shape[1]]) > tolerance
        leads[:1] = True
        if not leads.all():
            part = signed_q(remainder[:, leads])
        part = signed_q(_project_out(part, frames))
        found = np.hstack([found, part[:, : room - found.shape[1]]])
        remainder = remainder[:, ~leads]
    return found


def _project_out(X: FloatArray, frames: Sequence[FloatArray]) -> FloatArray:
    """Subtract from `X` its projections on orthonormal frames, in the precision of `X`."""
    remainder = X
    for frame in frames:
        remainder = remainder - _combine(frame, _inner_products(frame, remainder)).astype(X.dtype, copy=False)
    return remainder


def _inner_products(frame: FloatArray, X: FloatArray) -> FloatArray:
    """Return ``frame.T @ X`` in float64, as a sum over chunks: serial sums of 1e6 terms lose digits."""
    total = np.zeros((frame.shape[1], X.shape[1]))
    for start in range(0, X.shape[0], _ROWS_PER_SUM):
        rows = slice(start, start + _ROWS_PER_SUM)
        total += frame[rows].T.astype(_F64, copy=False) @ X[rows].astype(_F64, copy=False)
    return total


def _combine(frame: FloatArray, coordinates: FloatArray) -> FloatArray:
    """Return ``frame @ coordinates``, stored by columns: BLAS is ten times slower on thin rows."""
    result: FloatArray = (coordinates.T.astype(frame.dtype, copy=False) @ frame.T).T
    return result


def _cholesky_q(matrix: FloatArray) -> FloatArray:
    """Return `signed_q` of a well-conditioned matrix by Cholesky, several times faster if it is tall."""
    lower = np.linalg.cholesky(_inner_products(matrix, matrix))
    return _combine(matrix, np.linalg.inv(lower).T)


def _pad_rows(X: FloatArray, rows: int) -> FloatArray:
    """Append rows of zeros to `X`, up to `rows` rows."""
    return np.vstack([X, np.zeros((rows - X.shape[0], X.shape[1]))])


def _tolerance(dtype: np.dtype[Any]) -> float:
    return _ROUNDING * float(np.finfo(dtype).eps)
