#!/usr/bin/env python3
"""The pool next to its peers, in one run.

    python tests/benchmarks/run.py [--quick] [--only p256] [--callers 1,8,64] ...
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from pkcs11_pool import TokenPool, softhsm
from pkcs11_pool.bench import contenders, measure, programs, work

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent


async def prepare(token: softhsm.ThrowawayToken) -> work.Material:
    async with TokenPool(token.module, token_label=token.label, pin=token.user_pin) as p:
        return await work.make_keys(p, "bench")


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", type=words, default=["p256"])
    parser.add_argument("--callers", type=numbers, default=[1, 8, 64])
    parser.add_argument("--peers", type=words, default=["bare", "pool"])
    parser.add_argument("--scenarios", type=words, default=["local", "network"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--sessions", type=int)
    options = parser.parse_args(arguments)
    rounds = options.rounds or (3 if options.quick else 7)
    seconds = options.seconds or (0.5 if options.quick else 1.0)
    with (
        tempfile.TemporaryDirectory() as name,
        softhsm.throwaway_token() as token,
    ):
        directory = Path(name)
        bare = programs.compile_c(programs.BARE, directory)
        delay = programs.compile_c(
            HERE / "delay.c",
            directory,
            "-shared",
            "-fPIC",
            f"-I{HERE.parent / 'faultmodule'}",
        )
        material = anyio.run(prepare, token)
        known = contenders.bare(bare) + contenders.pools(options.sessions)
        chosen = [
            one
            for one in known
            if one.name in options.peers or one.name.split("-")[0] in options.peers
        ]
        scenarios = {
            "local": measure.Scenario(
                name="local",
                title="local",
                module=str(token.module),
                label=token.label,
                pin=token.user_pin,
                material=material,
            ),
            "network": measure.Scenario(
                name="network",
                title="behind 500 us per call",
                module=str(delay),
                label=token.label,
                pin=token.user_pin,
                material=material,
                environment={
                    "PKCS11_DELAY_TARGET": str(token.module),
                    "PKCS11_DELAY_US": "500",
                },
            ),
        }
        plan = measure.Plan(
            blocks=[[scenarios[name]] for name in options.scenarios],
            contenders=chosen,
            operations=options.only,
            callers=options.callers,
            rounds=rounds,
            warm=0.2,
            seconds=seconds,
        )
        done = 0

        def advance(what: str) -> None:
            nonlocal done
            done += 1
            if sys.stderr.isatty():
                print(f"\r\033[K{done}/{plan.turns} {what}", end="", file=sys.stderr)

        results = measure.run(plan, advance)
    for (scenario, client), said in results.failures.items():
        print(f"FAILED {scenario} {client}: {said}")
    for block in plan.blocks:
        for group in plan.groups(block):
            for cell in group:
                rate, ratio = results.rate(cell), results.ratio(cell)
                p50, p99 = results.p50(cell), results.p99(cell)
                if rate is None or p50 is None or p99 is None:
                    continue
                shown = (
                    f"{ratio.median:6.2f} ({ratio.least:.2f}-{ratio.most:.2f})"
                    if ratio
                    else ""
                )
                print(
                    f"{cell.scenario:8} {cell.operation:8} {cell.callers:3} "
                    f"{cell.client:14} {rate.median:10,.0f}/s {shown:20} "
                    f"p50 {p50.median:9,.0f} us p99 {p99.median:9,.0f} us"
                    + (f"  WRONG {results.wrong[cell]}" if results.wrong[cell] else "")
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
