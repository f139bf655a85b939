# SPDX-License-Identifier: MIT
r"""Best low-rank approximations of a matrix, optionally weighted by a second moment of its inputs.

The rank-r minimiser of :math:`\|(M - M_r) S^{1/2}\|_F` is :math:`M_r = U_r U_r^T M`, where :math:`U_r` has
the r leading left singular vectors of :math:`A = M S^{1/2}` as its columns. They are eigenvectors of
:math:`A A^T = M S M^T`. This form needs no inverse of :math:`S^{1/2}`: directions without inputs keep the
projected weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch

#: Largest side of a matrix that is decomposed directly.
_DIRECT: Final = 1024
#: Largest rank, relative to the smaller side, that the iteration looks for; above it, the Gram matrix is
#: decomposed.
_ITERATED_SHARE: Final = 0.125
#: Surplus vectors of a block that has more of them than eigenvectors are wanted.
_SURPLUS: Final = 8
#: Least width of a block that is narrower. Products with fewer vectors take longer per vector.
_NARROW: Final = 32
#: Relative distance below which eigenvalues count as equal.
_CLUSTER: Final = 2e-3
#: Most vectors of the iteration per vector of a wide block.
_MAX_BLOCKS: Final = 40
#: Error of the iteration: estimated relative excess of the squared error over its minimum.
_EXCESS: Final = 4e-6
#: Squared relative error of the approximation below which the iteration runs in float64.
_NEEDS_DOUBLE: Final = 1e-5
#: First rank that is tried for an error of a large matrix; then it is doubled.
_FIRST_RANK: Final = 32
#: Rows that are converted to float64 at a time.
_CHUNK: Final = 512

_Apply = Callable[[torch.Tensor], torch.Tensor]


def get_double_device(device: torch.device) -> torch.device:
    """Return the device for computations in float64: the device itself, or the host where it has none."""
    return torch.device("cpu") if device.type == "mps" else device


class Approximation:
    """Best approximations ``U_r U_r^T M`` of a matrix for all ranks.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)
        Matrix M, real and finite.
    second : Tensor of float64, shape (n, n) or (n,), optional
        Second moment S of the inputs, or its diagonal. Default: the identity matrix.

    Attributes
    ----------
    total : float
        Squared norm ``||M S^{1/2}||_F^2``.

    Notes
    -----
    Cost: a decomposition in float64, O(m n min(m, n)), if a side is at most 1024. Larger matrices are
    decomposed by block Lanczos iteration on ``M S M^T`` with full reorthogonalisation, which multiplies M
    by some hundreds of vectors for r = 64, or, for ranks above an eighth of the smaller side, by an
    eigendecomposition of a Gram matrix.
    """

    def __init__(self, matrix: torch.Tensor, second: torch.Tensor | None = None) -> None:
        self._matrix, self._second = matrix, second
        self._double: torch.Tensor | None = None
        #: Leading left singular vectors found so far, as columns, and their energies sigma^2.
        self._vectors = matrix.new_empty(len(matrix), 0)
        self._energies = matrix.new_empty(0, dtype=torch.float64)
        if second is None:
            self.total = sum_of_squares(matrix)
        else:
            weighted = self._weigh(self._in_double())
            self.total = max(float((weighted * self._in_double()).sum()), 0.0)

    @property
    def highest_rank(self) -> int:
        """Smaller side of the matrix."""
        return min(self._matrix.shape)

    def find_basis(self, rank: int) -> torch.Tensor:
        """Return ``U_r``, shape (m, r), in float64."""
        if self._vectors.shape[1] < rank:
            self._vectors, self._energies = self._decompose(rank)
        return self._vectors[:, :rank]

    def project(self, basis: torch.Tensor) -> torch.Tensor:
        """Return ``basis^T M`` in float64, computed in float32 if M is large and not in float64."""
        if self._is_small() or self._second is not None or self._matrix.dtype == torch.float64:
            return basis.T @ self._in_double()
        return (basis.T.float() @ self._matrix.float()).double()

    def find_rank(self, target: float) -> int:
        """Return the smallest rank, at least 1, with ``||(M - M_r) S^{1/2}||_F^2 <= target``."""
        rank = self.highest_rank if self._is_small() else min(_FIRST_RANK, self.highest_rank)
        while True:
            self.find_basis(rank)
            left = self.total - self._energies.cumsum(0)
            fits = torch.nonzero(left <= target).flatten()
            if len(fits):
                return int(fits[0]) + 1
            if len(left) >= self.highest_rank:
                return self.highest_rank
            rank = min(2 * len(left), self.highest_rank)

    def _is_small(self) -> bool:
        return self.highest_rank <= _DIRECT

    def _decompose(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return at least `rank` leading left singular vectors of ``M S^{1/2}``, and their energies."""
        if self.total == 0.0:
            eye = torch.eye(len(self._matrix), rank, dtype=torch.float64, device=self._matrix.device)
            return eye, eye.new_zeros(rank)
        if self._is_small() and self._second is None:
            left, values, _ = torch.linalg.svd(self._in_double(), full_matrices=False)
            return left, values.square()
        if self._is_small() or rank > _ITERATED_SHARE * self.highest_rank:
            return self._decompose_gram(rank)
        return self._iterate(rank)

    def _decompose_gram(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Decompose the Gram matrix of the smaller side, in float64."""
        matrix = self._in_double()
        if matrix.shape[0] <= matrix.shape[1]:
            energies, vectors = torch.linalg.eigh(self._weigh(matrix) @ matrix.T)
            return vectors.flip(1), energies.flip(0).clamp_min(0.0)
        root = matrix if self._second is None else _multiply_root(matrix, self._second)
        energies, vectors = torch.linalg.eigh(root.T @ root)
        kept = max(rank, min(_DIRECT, matrix.shape[1]))
        # QR, because images of vectors with tiny singular values are not orthogonal to the others.
        left = torch.linalg.qr(root @ vectors.flip(1)[:, :kept])[0]
        return left, energies.flip(0)[:kept].clamp_min(0.0)

    def _iterate(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = len(self._matrix)
        is_single = self._second is None and self._matrix.dtype != torch.float64
        if is_single:
            # Squares of unscaled weights can underflow in float32.
            matrix = self._matrix.float() / math.sqrt(self.total)
            vectors, shares = find_leading(lambda x: (x @ matrix) @ matrix.T, size, rank, 1.0, matrix)
            if 1.0 - float(shares.sum()) > _NEEDS_DOUBLE:
                return vectors, shares * self.total
        double = self._in_double()
        return find_leading(lambda x: self._weigh(x @ double) @ double.T, size, rank, self.total, double)

    def _in_double(self) -> torch.Tensor:
        if self._double is None:
            self._double = self._matrix.to(torch.float64)
        return self._double

    def _weigh(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product of rows with the second moment."""
        if self._second is None:
            return rows
        return rows * self._second if self._second.ndim == 1 else rows @ self._second


def find_leading(
    apply: _Apply, size: int, rank: int, total: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return leading eigenvectors (size, rank) and eigenvalues of a positive semidefinite matrix G.

    Block Lanczos iteration with full reorthogonalisation. Narrow blocks need fewer products, because the
    polynomials have a higher degree, but find at most as many equal eigenvalues as they have vectors. If as
    many are nearly equal, the iteration is repeated with more vectors than are wanted. It ends when the sum
    of the eigenvalues that are missed by the approximation, ``total - sum``, is estimated to be within 4e-6
    of its minimum; the estimate extrapolates the last changes as a geometric series.

    Parameters
    ----------
    apply : callable
        Map of rows X (k, size) to ``X G``.
    size, rank : int
        Size of G, and number of eigenvectors.
    total : float
        Trace of G.
    like : Tensor
        Tensor with the precision and the device of the iteration.

    Notes
    -----
    The subspace iteration of `dlnfast._problem.factors.leading_factors` uses only the newest block. For
    spectra without gaps, such as those of Gaussian matrices, it needs several times as many products.
    """
    wide = rank + _SURPLUS
    width = min(wide, max(_NARROW, rank // 2))
    vectors, values = _run_lanczos(apply, size, rank, width, total, like)
    firsts, lasts = values[: rank - width + 1], values[width - 1 :]
    if width < wide and bool((firsts - lasts <= _CLUSTER * firsts).any()):
        vectors, values = _run_lanczos(apply, size, rank, wide, total, like)
    return vectors, values


def _run_lanczos(
    apply: _Apply, size: int, rank: int, width: int, total: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `find_leading` with blocks of this width."""
    n_blocks = min(_MAX_BLOCKS * (rank + _SURPLUS), size) // width
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(count, size, generator=generator, dtype=torch.float64).to(like)

    basis = like.new_empty(n_blocks * width, size)
    parts: list[torch.Tensor] = []
    # One product first: the Lanczos space then starts with vectors close to the wanted ones.
    block, _ = orthonormalise(apply(draw(width)))
    epsilon = 8 * float(torch.finfo(like.dtype).eps)
    checks: list[tuple[int, float]] = []
    first = -(-rank // width)
    check_at, used = 2 * first, 0
    for number in range(1, n_blocks + 1):
        start, used = used, used + width
        basis[start:used] = block
        image = apply(block)
        # G is block tridiagonal in this basis.
        recent = basis[max(start - width, 0) : used]
        parts.append(image @ recent.T)
        if number == check_at:
            values = torch.linalg.eigvalsh(_assemble(parts))[-rank:]
            checks.append((number, float(values.double().sum())))
            wanted = max(_EXCESS * (total - checks[-1][1]), epsilon * total)
            excess, ratio = _extrapolate(checks)
            if excess <= wanted:
                break
            # Lanczos iteration converges faster than a geometric series.
            steps = math.log(wanted / excess) / math.log(ratio) if ratio else 1.0
            check_at += min(max(1, int(0.7 * steps)), 3 * first)
        if number == n_blocks:
            break
        block = _find_new_directions(image - parts[-1] @ recent, basis[:used], image, draw)
    energies, vectors = torch.linalg.eigh(_assemble(parts))
    chosen = vectors[:, -rank:].flip(1)
    return (basis[:used].T @ chosen).double(), energies[-rank:].double().flip(0).clamp_min(0.0)


def _assemble(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the symmetric block tridiagonal matrix, whose rows of blocks up to the diagonal are `parts`."""
    width = len(parts[0])
    matrix = parts[0].new_zeros(len(parts) * width, len(parts) * width)
    for number, part in enumerate(parts):
        rows = slice(number * width, (number + 1) * width)
        columns = slice((number + 1) * width - part.shape[1], (number + 1) * width)
        matrix[rows, columns] = part
        matrix[columns, rows] = part.T
    return matrix


def _find_new_directions(
    rows: torch.Tensor, known: torch.Tensor, image: torch.Tensor, draw: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """Return orthonormal rows that span `rows` and are orthogonal to the rows of `known`.

    `rows` is the image of a block after the subtraction of its largest components. Rows that vanish, because
    `known` is an invariant subspace, are replaced by random ones.
    """
    epsilon = 8 * float(torch.finfo(rows.dtype).eps)
    before = torch.linalg.vector_norm(image, dim=1, keepdim=True)
    rows = rows - (rows @ known.T) @ known
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    is_lost = (norms <= epsilon * before.max()).flatten()
    rows = rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)
    if bool(is_lost.any()):
        rows[is_lost] = draw(int(is_lost.sum())) / math.sqrt(rows.shape[1])
    block, is_dependent = orthonormalise(rows)
    if is_dependent or bool((norms < 0.01 * before).any()):
        # Cancellation, and completion by QR, leave components along known directions.
        for _ in range(2):
            block, _ = orthonormalise(block - (block @ known.T) @ known)
    return block


def _extrapolate(checks: list[tuple[int, float]]) -> tuple[float, float]:
    """Extrapolate a growing sum, of which some values are known by numbers of blocks, as a geometric series.

    Returns the estimated distance of the last value from the limit, and the ratio of the series; the ratio
    is 0 if it is not known.
    """
    if len(checks) == 1:
        return math.inf, 0.0
    (n_1, value_1), (n_2, value_2) = checks[-2:]
    change = max(value_2 - value_1, 0.0)
    if len(checks) == 2:
        return change, 0.5
    n_0, value_0 = checks[-3]
    before = (value_1 - value_0) / (n_1 - n_0)
    now = change / (n_2 - n_1)
    if now >= before or now <= 0.0:
        return change, 0.0
    ratio = (now / before) ** (2 / (n_2 - n_0))
    share = ratio ** (n_2 - n_1)
    return change * share / (1.0 - share), ratio


def orthonormalise(rows: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return an orthonormal basis of the span of rows, and whether they are nearly dependent.

    Cholesky twice, or QR if they are, which completes the basis by arbitrary directions.
    """
    result = rows
    for _ in range(2):
        lower, info = torch.linalg.cholesky_ex(result @ result.T)
        pivots = lower.diagonal()
        if int(info) or not float(pivots.min()) > 1e-3 * float(pivots.max()):
            return torch.linalg.qr(rows.T)[0].T.contiguous(), True
        result = torch.linalg.solve_triangular(lower, result, upper=False)
    return result, False


def refit_left(
    weight: torch.Tensor, second: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Fit the first factor of ``W ~ A (I_k x B)`` to outputs, for a fixed second factor.

    The inputs consist of k parts, to each of which B is applied. The result minimises
    ``||(W - A (I_k x B)) S^{1/2}||_F``; directions without inputs keep `left`.

    Parameters
    ----------
    weight : Tensor, shape (m, k n)
        Matrix W.
    second : Tensor, shape (k n, k n)
        Second moment S.
    left : Tensor, shape (m, k, r)
        Initial factor A.
    right : Tensor, shape (r, n)
        Factor B.

    Returns
    -------
    Tensor, shape (m, k, r)
    """
    rank, size = right.shape
    k = left.shape[1]
    images = (second.reshape(-1, size) @ right.T).reshape(k * size, k * rank)
    cross = weight @ images
    gram = torch.einsum("pn,knl->kpl", right, images.reshape(k, size, -1)).reshape(k * rank, k * rank)
    start = left.reshape(len(weight), -1)
    ridge = 1e-10 * float(gram.diagonal().max())
    if ridge <= 0.0:
        return left
    gram_plus = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex((gram_plus + gram_plus.T) / 2)
    if int(info):
        return left
    change = torch.cholesky_solve((cross - start @ gram).T, lower).T
    return (start + change).reshape(left.shape)


def balance_factors(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rescale the columns of `left` (m, r) and the rows of `right` (r, n) to equal norms."""
    norms = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    scale = torch.sqrt(norms[1] / norms[0])
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    return left * scale, right / scale[:, None]


def sum_of_squares(matrix: torch.Tensor) -> float:
    """Return ``||matrix||_F^2`` in float64."""
    norm = torch.linalg.vector_norm(matrix.to(get_double_device(matrix.device)), dtype=torch.float64)
    return float(norm) ** 2


def squared_difference(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """Return ``||matrix - left right||_F^2`` in float64, without a copy of the whole matrix."""
    result = 0.0
    for start in range(0, len(matrix), _CHUNK):
        rows = slice(start, start + _CHUNK)
        result += sum_of_squares(matrix[rows].double() - left[rows] @ right)
    return result


def _multiply_root(matrix: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return ``matrix R`` with ``R R^T = second``."""
    if second.ndim == 1:
        return matrix * second.clamp_min(0.0).sqrt()
    values, vectors = torch.linalg.eigh(second)
    root: torch.Tensor = (matrix @ vectors) * values.clamp_min(0.0).sqrt()
    return root
