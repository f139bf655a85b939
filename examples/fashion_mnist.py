# SPDX-License-Identifier: MIT
"""Train a linear network of depth 4 on all of Fashion-MNIST, and plot the singular values of its first layer.

    python examples/fashion_mnist.py FOLDER

FOLDER holds a copy of the data; without it, the environment variable DLNFAST_DATA names it.
"""

import argparse
from pathlib import Path

import numpy as np

import dlnfast as dln

DEPTH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="folder or file with Fashion-MNIST")
    parser.add_argument("--picture", type=Path, default=Path("out/fashion_mnist.png"), help="where to draw")
    arguments = parser.parse_args()

    images, labels = dln.load_fashion_mnist(arguments.data, "train")
    test_images, test_labels = dln.load_fashion_mnist(arguments.data, "test")
    problem = dln.Problem.from_data(images, labels, whiten="zca", layout="rows")
    print(f"{problem}, whitened to {problem.whitening.error:.1e}")

    # Above this rate the strongest mode oscillates. From a small scale the modes are learned one by one.
    limit = dln.theory.stability_threshold(problem.target_factors().s[0], DEPTH, problem.loss_scale)
    weights = dln.orthogonal([problem.dim_in] * DEPTH + [problem.dim_out], scale=0.1)
    run = dln.train(
        problem, weights, learning_rate=0.65 * limit, steps=10_000, record=dln.Record(every=50, progress=True)
    )
    print(run.certificate)
    print(f"{len(run.loss) - 1} steps in {run.wall_time:.2f} s")
    print(f"loss {run.loss[0]:.6f} -> {run.loss[-1]:.6f}, least possible {problem.loss_floor:.6f}")

    for name, x, y in (("train", images, labels), ("test", test_images, test_labels)):
        inputs = problem.transform(x)
        maps = (run.end_to_end(), problem.least_squares)
        network, best = (np.mean((matrix @ inputs).argmax(axis=0) == y) for matrix in maps)
        print(f"{name} accuracy {network:.4f} (least squares {best:.4f})")

    display = dln.plots.SingularValueDisplay.from_trajectory(run, layer=1).plot()
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    display.figure_.savefig(arguments.picture, dpi=150)
    print(f"written: {arguments.picture}")


if __name__ == "__main__":
    main()
