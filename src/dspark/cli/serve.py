"""Serve a target model over HTTP, for any OpenAI client.

Without options: the embedded pair on http://127.0.0.1:8000. Logs are JSON lines on stderr and hold no text of requests.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.cli.models import (
    add_hub,
    add_overlap,
    add_placement,
    add_threads,
    check_names,
    check_overlap,
    drafter_name,
    open_target,
    set_threads,
)
from dspark.cli.terminal import progress, say
from dspark.errors import DSparkError, InvalidConfiguration

if TYPE_CHECKING:
    from torch import Tensor

    from dspark import Engine
    from dspark.budget.kept import Kept
    from dspark.monitor.identity import LogitsOf
    from dspark.monitor.monitoring import Monitoring
    from dspark.serve.backend import Watched
    from dspark.serve.settings import ServeSettings
    from dspark.target.target import Target

_MOST_PARAMETERS_TWICE = 10**9  # a larger target is not loaded a second time
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", nargs="?", default="tiny", help="tiny (the embedded one, default), a folder or a hub id"
    )
    models = parser.add_argument_group("models")
    models.add_argument("--drafter", help="as for generate (default: dspark for tiny, otherwise none)")
    add_placement(models)
    add_hub(models)
    models.add_argument("--served-model-name", action="append", metavar="NAME", help="name in the API; repeatable")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--scheduler", "--policy", default="auto", help="as for generate (default auto)")
    engine.add_argument("--rule", default="coupled", choices=["coupled", "rejection"], help="default coupled")
    engine.add_argument(
        "--max-num-seqs", type=_positive, default=32, metavar="N", help="requests decoded together (32)"
    )
    engine.add_argument(
        "--max-num-batched-tokens", type=_positive, default=512, metavar="N", help="prompt tokens a step (512)"
    )
    engine.add_argument(
        "--max-model-len", type=_positive, metavar="N", help="prompt and output (default: the target's)"
    )
    engine.add_argument(
        "--num-slots", type=_positive, metavar="N", help="tokens that the KV cache holds (default 65536)"
    )
    engine.add_argument(
        "--prefix-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="tokens of past requests kept, so that the next turn need not read them again; 0: none (16384)",
    )
    engine.add_argument(
        "--beliefs", type=Path, metavar="FILE", help="keeps what is learned of drafts (default: in ~/.cache/dspark)"
    )
    engine.add_argument("--seed", type=int, metavar="N", help="for requests without one (default: a new one for each)")
    engine.add_argument("--compile", action="store_true", help="compile the models first: slow start, faster steps")
    engine.add_argument(
        "--deterministic", action="store_true", help="a request's logits have the same bits alone and in company"
    )
    add_overlap(engine)
    add_threads(engine)
    access = parser.add_argument_group("access")
    access.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    access.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    access.add_argument("--api-key", action="append", metavar="KEY", help="repeatable; also: DSPARK_API_KEY")
    access.add_argument("--api-key-file", metavar="FILE", help="one key a line")
    access.add_argument(
        "--cors-origin", action="append", metavar="ORIGIN", help="web pages that may call; * is every one"
    )
    limits = parser.add_argument_group("limits and logs")
    limits.add_argument("--max-waiting", type=int, default=256, metavar="N", help="queue; beyond it 429 (256)")
    limits.add_argument("--max-body-bytes", type=_positive, metavar="N", help="of one HTTP request (4 MiB)")
    limits.add_argument("--max-choices", type=_positive, metavar="N", help="prompts times n in one request (32)")
    limits.add_argument("--request-timeout", type=float, metavar="SECONDS", help="a request is cancelled then (600)")
    limits.add_argument("--drain-timeout", type=float, default=30.0, metavar="SECONDS", help="on SIGTERM (30)")
    limits.add_argument(
        "--stuck-after", type=float, default=120.0, metavar="SECONDS", help="a step is reported then (120)"
    )
    limits.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"], help="default info"
    )
    watch = parser.add_argument_group("monitoring (/metrics, /dashboard)")
    watch.add_argument(
        "--canary-share",
        type=float,
        default=0.01,
        metavar="X",
        help="of requests, replayed without drafts when idle (0.01)",
    )
    watch.add_argument("--event-log", metavar="FILE", help="JSON lines: differing canaries, drift; no text of requests")
    watch.add_argument(
        "--request-log", metavar="FILE", help="JSON lines: when requests came and their steps ended; no text"
    )
    watch.add_argument("--slo-ttft", type=float, default=1.0, metavar="SECONDS", help="objective: first token (1)")
    watch.add_argument(
        "--slo-per-token", type=float, default=0.1, metavar="SECONDS", help="objective: later ones (0.1)"
    )
    limits.add_argument("--log-text", action="store_true", help="put the text of requests into the log")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {number}")
    return number


def run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    check_overlap(args)
    try:
        import llguidance  # noqa: F401  # only needed later, when the engine's process has begun

        from dspark.serve.engine_process import EngineProcess
        from dspark.serve.logs import log_to_stderr
        from dspark.serve.process import listen, serve
    except ImportError as error:
        raise DSparkError(f'serving needs {error.name}: pip install "dspark[serve]"') from error
    listening = listen(args.host, args.port)
    with EngineProcess(watched_engine, args) as engine:
        doing = ", and compiling it, which can take some minutes the first time" if args.compile else ""
        with progress(f"loading {args.target}{doing}", no_color=False):
            from transformers.dynamic_module_utils import init_hf_modules

            from dspark.serve.app import make_app
            from dspark.serve.dashboard import make_dashboard

            if args.trust_remote_code:
                init_hf_modules()  # the engine sends its tokenizer, whose code transformers has put there
            engine.wait_until_ready()
        log_to_stderr(args.log_level)
        app = make_app(engine, settings, [make_dashboard(engine.snapshot, is_ending=lambda: engine.is_draining)])
        host = f"[{args.host}]" if ":" in args.host else args.host
        say(f"serving {', '.join(settings.model_names)} on http://{host}:{listening.getsockname()[1]} (Ctrl-C ends it)")
        if args.host not in _LOOPBACK and not settings.api_keys:
            say("warning: anyone who reaches this address can use it; --api-key asks for a key")
        serve(app, engine, listening, args.drain_timeout)
    return 1 if engine.has_failed else 0


def watched_engine(args: argparse.Namespace) -> Watched:
    """What runs in the engine's process: a started worker, watched by the metrics."""
    from dspark.engine.worker import Worker
    from dspark.monitor.request_log import RequestLog
    from dspark.serve.backend import Watched
    from dspark.serve.logs import log_to_stderr

    logging.basicConfig(format="%(name)s: %(message)s")
    engine = _engine(args)
    _warm_up(engine)
    log_to_stderr(args.log_level)
    monitoring, kept = _monitoring(args, engine), _kept(args, engine)
    logs = [RequestLog(args.request_log)] if args.request_log else []
    worker = Worker(
        engine,
        max_waiting=args.max_waiting,
        stuck_seconds=args.stuck_after,
        observers=[monitoring.step, *kept],
        on_finished=[monitoring.request, *(each.request for each in logs)],
        idle_tasks=[monitoring.idle],
        at_end=[monitoring.close, *(each.close for each in logs), *(learned.save for learned in kept)],
        drafter=drafter_name(args),
    )
    return Watched(worker.start(), monitoring.metrics.render, monitoring.snapshot)


def _settings(args: argparse.Namespace) -> ServeSettings:
    from dspark.serve.settings import ServeSettings

    keys = list(args.api_key or ())
    if args.api_key_file:
        try:
            lines = Path(args.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfiguration(f"--api-key-file cannot be read: {error}") from error
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise InvalidConfiguration(f"--api-key-file {args.api_key_file} holds no key: write one a line")
    keys += [key for key in [os.environ.get("DSPARK_API_KEY")] if key]
    if not all(keys):
        raise InvalidConfiguration("--api-key is empty: give a key, or leave the option out")
    settings = ServeSettings(
        model_names=_names(args),
        api_keys=tuple(keys),
        cors_origins=tuple(args.cors_origin or ()),
        log_text=args.log_text,
        seed=args.seed,
    )
    given = {
        "max_body_bytes": args.max_body_bytes,
        "max_choices": args.max_choices,
        "request_seconds": args.request_timeout,
    }
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(args.served_model_name or [Path(args.target).name if Path(args.target).exists() else args.target])


def _engine(args: argparse.Namespace) -> Engine:
    from dspark import Engine, load_drafter

    check_names(args.target, drafter_name(args), args.scheduler, args.rule)
    set_threads(args)
    target = open_target(args, deterministic=args.deterministic)
    if target.tokenizer is None:
        raise InvalidConfiguration(f"{args.target} has no tokenizer, and the API is made of text")
    drafter = load_drafter(drafter_name(args), target)
    return Engine(
        target,
        drafter,
        args.scheduler,
        rule=args.rule,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        num_slots=args.num_slots,
        max_length=args.max_model_len,
        prefix_tokens=args.prefix_tokens,
        compile=args.compile,
        overlap=args.overlap,
    )


def _kept(args: argparse.Namespace, engine: Engine) -> list[Kept]:
    """What the next server goes on from: costs of steps, and beliefs about drafts if the scheduler heeds them."""
    from dspark.budget.beliefs import LiveBeliefs
    from dspark.budget.kept import keep_beliefs, keep_costs

    beliefs = [keep_beliefs(engine.beliefs, args.beliefs)] if isinstance(engine.beliefs, LiveBeliefs) else []
    return [keep_costs(engine.capacity), *beliefs]


def _warm_up(engine: Engine) -> None:
    """The first steps allocate what later ones reuse; no client should wait for that."""
    from dspark import SamplingParams

    length = min(8, engine.max_length - 2)
    engine.generate([[0] * length], SamplingParams(max_tokens=8, seed=0, ignore_eos=True))


def _monitoring(args: argparse.Namespace, engine: Engine) -> Monitoring:
    """Canaries compare tokens, which only the coupled rule promises."""
    from dspark import Engine
    from dspark.monitor.forecast import Limits
    from dspark.monitor.monitoring import Monitoring, MonitorSettings
    from dspark.monitor.request_metrics import Objectives

    objectives = Objectives(args.slo_ttft, args.slo_per_token)
    watch = MonitorSettings(args.canary_share, args.event_log, args.log_text, objectives)
    target = engine.target
    dtype = str(target.dtype).removeprefix("torch.")
    return Monitoring(
        _names(args)[0],
        drafter_name(args),
        target.cache.limit,
        watch,
        dtype=dtype,
        plain=Engine(target, None, max_num_seqs=4) if args.rule == "coupled" else None,
        logits_of=_single_precision(args, target) if dtype != "float32" else None,
        beliefs=engine.beliefs,
        cost=engine.capacity.seconds_of,
        capacity=engine.capacity,
        limits=Limits(args.max_num_seqs, target.cache.limit, args.max_num_batched_tokens, args.max_waiting),
    )


def _single_precision(args: argparse.Namespace, target: Target) -> LogitsOf | None:
    """The target in float32, loaded when a canary first differs; large ones are not, for the sake of memory and time."""
    from dspark.monitor.identity import logits_by_target

    if target.num_parameters > _MOST_PARAMETERS_TWICE:
        return None
    loaded: list[LogitsOf] = []

    def logits_of(context: Sequence[int]) -> Tensor:
        if not loaded:
            loaded.append(logits_by_target(open_target(args, "float32")))
        return loaded[0](context)

    return logits_of
