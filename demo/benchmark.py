"""Measure accuracy and latency of artefacts side by side, into report.json and report.md.

    python demo/benchmark.py teacher.pt student.pt student.onnx --data camvid:/data/CamVid --out runs/report

Without artefacts: the newest student under runs/, its teacher and its exported file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aicsd_deploy.bench.report import benchmark, summary_table, write_report
from aicsd_deploy.cli import Parser, add_json_flag, device_name, positive_int, run, write_result
from aicsd_deploy.console import say
from aicsd_deploy.data.spec import SPEC_HELP, SPLITS, open_dataset
from aicsd_deploy.runs import newest_comparison
from aicsd_deploy.runtime.base import open_backend


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("artifacts", type=Path, nargs="*", help=".pt and .onnx files")
    parser.add_argument("--data", metavar="SPEC", help=f"{SPEC_HELP} (default: what the first artefact was trained on)")
    parser.add_argument("--split", choices=SPLITS, default="val", help="which images")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the report (default: that of the last artefact)"
    )
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="CPU threads for every network (default: as the runtimes choose)",
    )
    parser.add_argument("--rounds", type=positive_int, metavar="N", default=20, help="rounds of timing, 5 frames each")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    paths = args.artifacts or newest_comparison()
    with open_backend(paths[0], device=args.device) as first:
        spec = args.data or first.metadata.data
    report = benchmark(
        paths, open_dataset(spec, args.split), device=args.device, threads=args.threads, rounds=args.rounds
    )
    written = write_report(report, args.out or paths[-1].parent)
    write_result(report, args.json)
    say("\n" + summary_table(report))
    say("\n".join(str(path) for path in written))


if __name__ == "__main__":
    run(main)
