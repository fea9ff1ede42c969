"""OPSD against SFT and GRPO with a real model: the target task, its transfer, skills not trained, and two tasks in sequence.

    python -m benchmarks.real_model                      everything
    python -m benchmarks.real_model --arms opsd-own      one arm
    python -m benchmarks.real_model --report             only print the tables of the existing results

The target task is the quick start's word problems. The references have one of three styles: ``own`` (the model's own words),
``terse`` and ``formal`` (notation and prose that the model does not write). OPSD and SFT read equally many references. GRPO
samples as many completions as OPSD. Each method tries the same learning rates on seed 0, with ``own`` and with ``terse``
references, and one more if the best is at an end. Validation questions choose one for each. All scores are those of the
weights after the last step.
Finished parts are not repeated.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.real_model.report import Report
from benchmarks.real_model.settings import ARMS, SEQUENCE_ARMS, SMALL, Scale

RESULTS = Path("docs/results/real_model")
PARTS = ("train", "measure", "sequence")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="another model's hub id or folder")
    parser.add_argument("--output", type=Path, default=Path("runs/real_model"), help="runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="result files (default: %(default)s)")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: %(default)s)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--small", action="store_true", help="check the whole chain with tiny runs")
    parser.add_argument("--report", action="store_true", help="only print the tables of the existing results")
    options = parser.parse_args(argv)
    if options.small and options.results == RESULTS:
        parser.error("--small needs another --results")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not options.report:
        from benchmarks.real_model.runs import Comparison
        from opsd_lightning.quickstart import MODEL_FOLDER, obtain_model

        model = options.model or str(obtain_model(MODEL_FOLDER))
        runs = Comparison(model, options.output, options.results, SMALL if options.small else Scale())
        arms = [ARMS[name] for name in options.arms]
        if "train" in options.parts:
            for seed in range(options.seeds):
                for arm in arms:
                    runs.train(arm, runs.chosen_rate(arm), seed)
        if "measure" in options.parts:
            runs.measure_base()
            for seed in range(options.seeds):
                for arm in arms:
                    runs.measure(arm, seed)
        if "sequence" in options.parts:
            for seed in range(options.seeds):
                for arm in (arm for arm in arms if arm.name in SEQUENCE_ARMS):
                    runs.train_second(arm, runs.chosen_second_rate(arm), seed)
                    runs.measure_second(arm, seed)
    print(Report(options.results).text())


if __name__ == "__main__":
    main()
