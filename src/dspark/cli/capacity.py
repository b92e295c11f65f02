"""How many requests can a server take within its latency objectives, and how many servers will tomorrow need?

    dspark profile --output capacity.json
    dspark capacity capacity.json --metrics http://127.0.0.1:8000/metrics

Seconds come from the file, the mix of requests and what drafts bring from a running server (or from --prompt-tokens,
--output-tokens and --tau), the rate of the last days from --prometheus or --rates.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cli.terminal import print_json
from dspark.errors import DSparkError, InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dspark.budget.capacity import Capacity
    from dspark.monitor.demand import Demand
    from dspark.monitor.forecast import Limits, Mix, Plan

_RATE = 'sum(rate(dspark_requests_finished_total{reason!="cancelled"}[1h]))'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("capacity", type=Path, metavar="FILE", help="what `dspark profile --output FILE` measured")
    mix = parser.add_argument_group("requests (numbers given here win over --metrics)")
    mix.add_argument("--metrics", metavar="URL", help="/metrics of a server that has seen them, or a saved page")
    mix.add_argument("--prompt-tokens", type=float, metavar="N", help="mean")
    mix.add_argument("--output-tokens", type=float, metavar="N", help="mean")
    mix.add_argument("--tau", type=float, metavar="X", help="tokens per target pass; 1 is plain decoding")
    mix.add_argument("--verified", type=float, metavar="X", help="draft tokens read per pass (default: 2 tau - 2)")
    server = parser.add_argument_group("server")
    server.add_argument("--max-num-seqs", type=int, default=32, metavar="N", help="as for serve (32)")
    server.add_argument("--max-num-batched-tokens", type=int, default=512, metavar="N", help="as for serve (512)")
    server.add_argument("--max-waiting", type=int, default=256, metavar="N", help="as for serve (256)")
    server.add_argument("--num-slots", type=int, metavar="N", help="KV (default: the server's, without one 65536)")
    objectives = parser.add_argument_group("objectives")
    objectives.add_argument("--slo-ttft", type=float, default=1.0, metavar="SECONDS", help="first token (1)")
    objectives.add_argument("--slo-per-token", type=float, default=0.1, metavar="SECONDS", help="later ones (0.1)")
    objectives.add_argument("--share", type=float, default=0.99, help="of requests that keep each of them (0.99)")
    demand = parser.add_argument_group("demand")
    demand.add_argument("--prometheus", metavar="URL", help="where the rate of the last days is, e.g. http://host:9090")
    demand.add_argument("--days", type=int, default=14, metavar="N", help="to ask it for (14)")
    demand.add_argument("--rates", type=Path, metavar="FILE", help="instead: requests per second, a line for each hour")
    demand.add_argument("--hours", type=int, default=24, metavar="N", help="to look ahead (24)")
    demand.add_argument("--quantile", type=float, default=0.95, metavar="X", help="of hours to have servers for (0.95)")
    demand.add_argument("--servers", type=int, default=1, metavar="N", help="that run now (1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    _check(args)
    try:
        from dspark.monitor.demand import forecast
        from dspark.monitor.forecast import make_plan, make_replica
        from dspark.monitor.request_metrics import Objectives
    except ImportError as error:
        raise DSparkError(f'a plan needs {error.name}: pip install "dspark[serve]"') from error

    capacity = _capacity(args.capacity)
    mix, limits = _mix_and_limits(args)
    objectives = Objectives(args.slo_ttft, args.slo_per_token)
    plan = make_plan(make_replica(capacity, mix, limits), mix, limits, objectives, args.share)
    rates = _rates(args)
    demand = None if rates is None else forecast(rates, args.hours, args.quantile)
    if args.json:
        print_json(_as_json(args, capacity, mix, plan, demand))
        return 0
    _report(args, capacity, mix, limits, plan)
    if demand is not None and rates is not None:
        _report_demand(args, plan, demand, len(rates))
    return 0


def _check(args: argparse.Namespace) -> None:
    whole = ("max_num_seqs", "max_num_batched_tokens", "max_waiting", "days", "servers")
    for name in (*whole, *(("num_slots",) if args.num_slots is not None else ())):
        if getattr(args, name) < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be 1 or more; got {getattr(args, name)}")
    for name in ("slo_ttft", "slo_per_token"):
        if not 0 < getattr(args, name) < math.inf:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be a number of seconds above 0")
    for name in ("share", "quantile"):
        if not 0 < getattr(args, name) < 1:
            raise InvalidRequest(f"--{name} must lie between 0 and 1; got {getattr(args, name)}")
    if args.prometheus and args.rates:
        raise InvalidRequest("--prometheus and --rates both tell the rate of the last days: leave one out")


def _capacity(path: Path) -> Capacity:
    """Measured on whichever machine: the forecast is about that one."""
    from dspark.budget.capacity import Capacity
    from dspark.errors import InvalidConfiguration

    capacity = Capacity.load(path, None)
    if not capacity.is_known:
        raise InvalidConfiguration(f"{path} holds no measured step: write one with `dspark profile --output {path}`")
    return capacity


def _mix_and_limits(args: argparse.Namespace) -> tuple[Mix, Limits]:
    from dspark.monitor.forecast import Limits, Mix
    from dspark.monitor.snapshot import read_page

    values: dict[str, float] = {}
    if args.metrics:
        try:
            values = read_page(_fetched(args.metrics))
        except ValueError as error:
            raise InvalidRequest(f"--metrics {args.metrics} is no page of metrics: {error}") from error
    seen = Mix.of_metrics(values)
    if seen is None and (args.prompt_tokens is None or args.output_tokens is None or args.tau is None):
        why = f"{args.metrics} has not seen a request finish" if args.metrics else "no --metrics"
        raise InvalidRequest(f"{why}: give --prompt-tokens, --output-tokens and --tau")
    by_load, spread = (seen.by_load, seen.spread) if seen else ((), (1.0,))
    if args.tau is not None and args.verified is not None and args.verified < args.tau - 1:
        raise InvalidRequest(
            f"of {args.tau:g} tokens per pass {args.tau - 1:g} are draft tokens: --verified must be so many or more; "
            f"got {args.verified:g}"
        )
    if args.tau is not None:
        by_load, spread = ((1.0, args.tau, 2 * args.tau - 2 if args.verified is None else args.verified),), (1.0,)
    elif args.verified is not None:
        raise InvalidRequest("--verified goes with --tau")
    mix = Mix(
        args.prompt_tokens if args.prompt_tokens is not None or seen is None else seen.prompt_tokens,
        args.output_tokens if args.output_tokens is not None or seen is None else seen.output_tokens,
        by_load,
        spread,
    )
    slots = args.num_slots or int(values.get("dspark_kv_slots", 65536))
    return mix, Limits(args.max_num_seqs, slots, args.max_num_batched_tokens, args.max_waiting)


def _fetched(address: str, **parameters: Any) -> str:
    """Of a URL or a file."""
    if not address.startswith(("http://", "https://")):
        try:
            return Path(address).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"cannot read {address}: {error}") from error
    try:
        import httpx
    except ImportError as error:
        raise DSparkError('reading from a server needs httpx: pip install "dspark[serve]"') from error
    try:
        answer = httpx.get(address, params=parameters or None, timeout=30.0).raise_for_status()
    except httpx.HTTPError as error:
        raise InvalidRequest(f"cannot read {address}: {error}") from error
    return answer.text


def _rates(args: argparse.Namespace) -> NDArray[np.float64] | None:
    """Hourly requests per second, oldest first; None when nobody asked."""
    import numpy as np

    if not (args.rates or args.prometheus):
        return None
    try:
        if args.rates:
            return np.array([float(line) for line in _fetched(str(args.rates)).split()])
        return _rates_of_prometheus(args)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{args.rates or args.prometheus} does not tell hourly rates: {error}") from error


def _rates_of_prometheus(args: argparse.Namespace) -> NDArray[np.float64]:
    """Hours in which nothing was scraped lie between their neighbours."""
    import time

    import numpy as np

    end = time.time() // 3600 * 3600
    query = {"query": _RATE, "start": end - 86400 * args.days, "end": end, "step": 3600}
    result = json.loads(_fetched(args.prometheus.rstrip("/") + "/api/v1/query_range", **query))["data"]["result"]
    if not result:
        raise InvalidRequest(f"{args.prometheus} knows no requests of DSpark in the last {args.days} days")
    times, rates = np.array(result[0]["values"], dtype=float).T
    return np.interp(np.arange(times[0], times[-1] + 1, 3600), times, rates)


def _num_servers(rate: float, plan: Plan) -> int:
    return math.ceil(rate / plan.highest_rate)


def _kv_full_in(args: argparse.Namespace, plan: Plan, demand: Demand) -> int | None:
    """Hours from now until the servers that run have no KV left, at the quantile; None: not in the time looked at."""
    if plan.kv_full_rate is None:
        return None
    full = (demand.upper >= args.servers * plan.kv_full_rate).nonzero()[0]
    return int(full[0]) if len(full) else None


def _report(args: argparse.Namespace, capacity: Capacity, mix: Mix, limits: Limits, plan: Plan) -> None:
    about = capacity.fingerprint
    print(f"measured: {about.get('target', '?')}, {about.get('dtype', '?')}, {about.get('hardware', '?')}")
    print(f"requests: {mix.prompt_tokens:.0f} prompt and {mix.output_tokens:.0f} output tokens")
    objectives = f"{args.slo_ttft:g} s to the first token and {args.slo_per_token:g} s per later one"
    gives_way = "first tokens" if plan.limited_by == "ttft" else "later tokens"
    if not plan.highest_rate:
        print(f"no rate keeps {objectives} for {args.share:.0%} of requests: {gives_way} take longer when alone")
        return
    print(f"one server takes {plan.highest_rate:.3g} requests/s within {objectives}, for {args.share:.0%} of requests")
    print(
        f"  then {plan.running:.1f} are decoded together, at most {plan.max_decoding}, tau {plan.tau:.2f} with "
        f"{plan.verified:.1f} draft tokens read per pass, {plan.kv_usage:.0%} of KV in use, on average "
        f"{plan.ttft_seconds:.2g} s to the first token and {plan.per_token_seconds:.2g} s per later one"
    )
    print(
        f"  beyond it {gives_way} come too late; from {plan.saturation:.3g} requests/s on the queue grows without end"
    )
    if plan.kv_full_rate is not None:
        print(f"  KV ({limits.num_slots} tokens) is full from {plan.kv_full_rate:.3g} requests/s on")


def _report_demand(args: argparse.Namespace, plan: Plan, demand: Demand, num_hours: int) -> None:
    median, upper = float(demand.median.max()), float(demand.upper.max())
    print(
        f"next {args.hours} hours, by the {num_hours} before: up to {median:.3g} requests/s expected, "
        f"{upper:.3g} at the {args.quantile:.0%} quantile"
    )
    if plan.highest_rate:
        print(f"  servers: {_num_servers(upper, plan)} for the quantile, {_num_servers(median, plan)} as expected")
    if demand.naive_pinball:
        ratio = demand.pinball / demand.naive_pinball
        print(
            f"  over those hours the quantile would have been {ratio:.2f} times as wrong as yesterday's curve (pinball)"
        )
    if (hours := _kv_full_in(args, plan, demand)) is not None:
        print(f"  KV of {args.servers} server{'s' * (args.servers > 1)} runs out in {hours} hours")


def _as_json(
    args: argparse.Namespace, capacity: Capacity, mix: Mix, plan: Plan, demand: Demand | None
) -> dict[str, Any]:
    from dataclasses import asdict

    result: dict[str, Any] = {"measured": capacity.fingerprint, "mix": asdict(mix), "plan": plan.as_json()}
    result["objectives"] = {"ttft": args.slo_ttft, "per_token": args.slo_per_token, "share": args.share}
    if demand is not None:
        result["demand"] = {
            "median": demand.median.tolist(),
            "upper": demand.upper.tolist(),
            "quantile": demand.quantile,
            "pinball": demand.pinball,
            "naive_pinball": demand.naive_pinball,
            "servers": [_num_servers(r, plan) for r in demand.upper.tolist()] if plan.highest_rate else None,
            "kv_full_in_hours": _kv_full_in(args, plan, demand),
        }
    return result
