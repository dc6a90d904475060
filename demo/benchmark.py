"""Measure accuracy, latency and cost of artefacts side by side: report.html, report.md, report.json, MODEL_CARD.md.

    python demo/benchmark.py teacher.pt student.pt student.onnx student.int8.onnx --data camvid:/data/CamVid --out runs/report
    python demo/benchmark.py student.onnx --baseline main/report.json --fail-if "p50_ms>1.1x" --fail-if "miou<-0.005"

Without artefacts: the newest student under runs/, its teacher and its exported file. With --fail-if, exit code 3 where an
artefact is worse than the one of the same name in the baseline, which must have them all (where several have it, folders
decide); the report is written all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a checkout that is not installed: cli says what is missing

from aicsd_deploy.cli import Parser, add_json_flag, add_runtime_flags, needed_packages, positive_int, run, write_result
from aicsd_deploy.console import say, table
from aicsd_deploy.errors import InputError
from aicsd_deploy.files import check_writable
from aicsd_deploy.runs import newest_comparison

with needed_packages():
    from aicsd_deploy.bench.gate import (
        Rule,
        other_machine,
        read_baseline,
        require_baseline,
        require_comparable,
        require_no_worse,
    )
    from aicsd_deploy.bench.report import benchmark
    from aicsd_deploy.bench.report_files import write_report
    from aicsd_deploy.bench.tables import names_of, noise, summary
    from aicsd_deploy.data.spec import SPEC_HELP, SPLITS, open_dataset
    from aicsd_deploy.runtime.base import open_backend


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("artifacts", type=Path, nargs="*", help=".pt, .onnx and .plan files")
    parser.add_argument("--data", metavar="SPEC", help=f"{SPEC_HELP} (default: what the first artefact was trained on)")
    parser.add_argument("--split", choices=SPLITS, default="val", help="which images")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the report (default: that of the last artefact)"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="artefact to hold the others against (default: the first)"
    )
    add_runtime_flags(parser, threads="CPU threads for every network (default: as the runtimes choose)")
    parser.add_argument("--rounds", type=positive_int, metavar="N", default=20, help="rounds of timing, 5 frames each")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="an earlier report.json, to compare with")
    parser.add_argument(
        "--fail-if",
        metavar="RULE",
        action="append",
        default=[],
        help="end with exit code 3 if p50_ms>1.1x (ratio to the baseline), miou<-0.005 (difference from it) or p50_ms>20 (value, "
        "which needs no baseline); any number of report.json; may be given again",
    )
    parser.add_argument(
        "--loadgen", metavar="SECONDS", type=positive_int, help="also run MLPerf's load generator, so long per scenario"
    )
    parser.add_argument(
        "--no-pictures", action="store_true", help="no frames in report.html, where the data may not be shown"
    )
    add_json_flag(parser)
    args = parser.parse_args(argv)
    paths = args.artifacts or newest_comparison()
    if args.reference is not None and args.reference not in paths:
        raise InputError(f"--reference {args.reference} is none of the artefacts: {', '.join(map(str, paths))}.")
    rules = [Rule.parse(text) for text in args.fail_if]
    require_baseline(args.baseline, rules)
    baseline = read_baseline(args.baseline) if args.baseline else None
    out = args.out or paths[-1].parent
    check_writable(out / "report.json")
    reference = paths.index(args.reference) if args.reference else 0
    if baseline:
        require_comparable([str(path) for path in paths], reference, baseline, rules)
        if args.baseline.resolve() == (out / "report.json").resolve():
            raise InputError(
                f"The report would be written over the baseline {args.baseline}, and the next run would be held against it. Give "
                "another --out."
            )
    with open_backend(paths[0], device=args.device, memory=args.memory) as first:
        spec = args.data or first.metadata.data
    report, pictures = benchmark(
        paths,
        open_dataset(spec, args.split),
        reference=reference,
        device=args.device,
        threads=args.threads,
        memory=args.memory,
        rounds=args.rounds,
        loadgen_s=args.loadgen,
        pictures=not args.no_pictures,
    )
    written = write_report(report, pictures, out)
    write_result(report, args.json)
    say("\n" + table(*summary(report)))
    for line in noise(report):
        say(f"noisy: {line}")
    say("\n".join(str(path) for path in written) + f" (of {names_of(report)[-1]})")
    if baseline and (differs := other_machine(report, baseline)):
        say(f"warning: the baseline was measured otherwise, so that times say little: {differs}")
    if rules:
        say("\n".join(require_no_worse(report, baseline, rules)))


if __name__ == "__main__":
    run(main)
