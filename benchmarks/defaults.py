"""Where the defaults come from: learning rate × damping on held-out training images.

    python -m benchmarks.defaults --data digits --network cnn --epochs 6

trains each method with the optimizers' own intervals (10, 10, 100) and decays, with a fifth of the
training images held out (at most 2000; the test images play no part), and prints a Markdown table
of the held-out loss and accuracy. ``--rule nu`` tries trace damping (TKFAC, TEKFAC) in place of a
constant, ``--rule factored_damping`` factored damping (EKFAC, TEKFAC), ``--rule relative_damping``
relative damping.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import warnings

from tekfac.data import Dataset
from tekfac.errors import Diverged
from tekfac.runs.config import Config
from tekfac.runs.training import Training, Watcher

LRS = (3e-4, 1e-3, 3e-3)
DAMPINGS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RULES = {
    "damping": DAMPINGS,
    "factored_damping": DAMPINGS,
    "relative_damping": DAMPINGS,
    "nu": (1e-2, 1e-1, 1.0, 10.0, 100.0),
}
INTERVALS = {"factor_every": 10, "basis_every": 100}


def held_out(data: Dataset) -> Dataset:
    """The training images, the last of them in the place of the test images."""
    count = min(len(data.y_train) // 5, 2000)
    return dataclasses.replace(
        data,
        x_train=data.x_train[:-count],
        y_train=data.y_train[:-count],
        x_test=data.x_train[-count:],
        y_test=data.y_train[-count:],
    )


def cell(config: Config, data: Dataset, seeds: int) -> str:
    """Mean loss and accuracy on the held-out images, or how many of the seeds diverged."""
    ends = []
    for seed in range(seeds):
        training = Training(dataclasses.replace(config, seed=seed), data)
        try:
            for _ in range(config.epochs):
                training.run_epoch(Watcher())
        except Diverged:
            continue
        ends.append(training.history[-1])
    if len(ends) < seeds:
        return f"{seeds - len(ends)} of {seeds} diverged"
    loss = statistics.mean(end.test_loss for end in ends)
    accuracy = statistics.mean(end.test_accuracy for end in ends)
    return f"{loss:.3f} ({100 * accuracy:.1f} %)"


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits")
    parser.add_argument("--network", default="cnn")
    parser.add_argument("--width", type=int)
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", default="kfac,ekfac,tkfac,tekfac")
    parser.add_argument("--lrs", default=",".join(map(str, LRS)))
    parser.add_argument("--rule", default="damping", choices=RULES)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # of steps skipped on the way to divergence
    name, values = options.rule, RULES[options.rule]
    task = Config(
        data=options.data,
        network=options.network,
        width=options.width,
        limit_train=options.limit_train,
        epochs=options.epochs,
        batch_size=options.batch_size,
        threads=options.threads,
    )
    data = held_out(task.load_data())
    print(f"| method | lr | {' | '.join(f'{name} {value:g}' for value in values)} |")
    print(f"| --- | --- |{' --- |' * len(values)}")
    for method in options.methods.split(","):
        for lr in map(float, options.lrs.split(",")):
            cells = []
            for value in values:
                settings = {"lr": lr, name: value, **INTERVALS}
                config = dataclasses.replace(task, optimizer=method, settings=settings)
                cells.append(cell(config, data, options.seeds))
            print(f"| {method} | {lr:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
