"""The verbs about jobs: `submit`, `generate`, `jobs`, `cancel`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.cli.ask import ConstraintsOption, Model, Strategy
from mesh.cli.frame import Debug, Json, Peer, note, print_json, printable
from mesh.errors import MeshError, RequestError

if TYPE_CHECKING:
    from mesh.client.blocking import Job
    from mesh.client.options import Options, Prompt
    from mesh.client.values import Generation

Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="How long to wait until the job is ready.")
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, as `mesh jobs` lists it.")]


def submit(
    model: Model,
    *,
    strategy: Strategy = "auto",
    constraint: ConstraintsOption = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the weights are loaded.")] = True,
    timeout_s: Timeout = 600.0,
    peer: Peer = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a model over the mesh. Prints the job's id."""
    from mesh.cli.constraints import parse
    from mesh.client.blocking import Mesh

    with Mesh(peer) as mesh:
        job = mesh.submit(model, strategy, parse(constraint or []))
        try:
            if wait:
                _load(job, timeout_s)
        except KeyboardInterrupt:
            note(f"job {job.id} goes on without this command; `mesh cancel {job.id}` ends it")
            raise
        if json:
            print_json(job.last.to_dict())
            return
        if wait and (plan := job.last.plan) is not None:
            note(f"{plan.strategy} over {' -> '.join(plan.ring)}, {plan.predicted.token_ms:.1f} ms a token predicted")
        print(job.id, flush=True)


def generate(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job's id; with --model the prompt stands here.")],
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - is stdin.")] = None,
    *,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Submit this model for this prompt, then cancel it.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="With --model: let the job live on.")] = False,
    strategy: Strategy = "auto",
    constraint: ConstraintsOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens [default: random].")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    timeout_s: Timeout = 600.0,
    peer: Peer = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt. The text streams to stdout; Ctrl-C cancels the request."""
    from mesh.cli.constraints import parse
    from mesh.client.blocking import Mesh
    from mesh.client.options import generate_request

    asked = _prompt(job if model is not None else prompt, chat=chat)
    if model is not None and prompt is not None:
        raise RequestError("generate takes a PROMPT and either JOB or --model: quote a prompt that has spaces")
    options: Options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or [],
        "ignore_eos": ignore_eos,
    }
    generate_request("", asked, options)  # a bad prompt or option is told before a model is loaded for it
    with Mesh(peer) as mesh:
        if model is None:
            _generate(mesh.job(job), asked, options, json=json)
            return
        own = mesh.submit(model, strategy, parse(constraint or []))
        try:
            _load(own, timeout_s)
            _generate(own, asked, options, json=json)
        finally:
            if not keep:
                _drop(own)
        if keep:
            note(f"job {own.id} lives on")


def jobs(*, peer: Peer = None, json: Json = False, debug: Debug = False) -> None:
    """The jobs a peer knows of."""
    from mesh.client.blocking import Mesh

    with Mesh(peer) as mesh:
        known = mesh.jobs()
    if json:
        print_json([job.to_dict() for job in known])
        return
    from mesh.cli.tables import show_jobs

    show_jobs(known)


def cancel(job: JobArgument, *, peer: Peer = None, json: Json = False, debug: Debug = False) -> None:
    """End a job and free its devices."""
    from mesh.client.blocking import Mesh

    with Mesh(peer) as mesh:
        handle = mesh.job(job)
        handle.cancel()
        if json:
            print_json(handle.last.to_dict())
            return
        note(f"job {handle.id} is {handle.last.state}")


def _prompt(text: str | None, *, chat: bool) -> Prompt:
    if text is None:
        raise RequestError("generate takes JOB and PROMPT, or --model MODEL and PROMPT")
    text = sys.stdin.read() if text == "-" else text
    return [{"role": "user", "content": text}] if chat else text


def _load(job: Job, timeout_s: float) -> None:
    """Wait until the job is ready, with a progress bar where stderr is a terminal."""
    if not sys.stderr.isatty():
        job.wait(timeout_s)
        return
    from mesh.cli.progress import wait

    wait(job, timeout_s)


def _generate(job: Job, prompt: Prompt, options: Options, *, json: bool) -> None:
    began_s = time.monotonic()
    with job.stream(prompt, **options) as stream:
        if json:
            print_json({"job": job.id, **stream.result().to_dict()})
            return
        clean = printable if sys.stdout.isatty() else str
        for chunk in stream:
            sys.stdout.write(clean(chunk.text))
            sys.stdout.flush()
        print(flush=True)
        if sys.stderr.isatty():
            note(_summary(stream.generation, time.monotonic() - began_s))


def _summary(generation: Generation, elapsed_s: float) -> str:
    tokens = len(generation.token_ids)
    rate = generation.timings.get("decode_tokens_per_s")
    speed = f"{rate:.1f} tokens/s" if isinstance(rate, (int, float)) else f"{elapsed_s:.1f} s"
    seed = f", seed {generation.seed}" if generation.seed else ""
    return f"{tokens} tokens, {speed}, ended by {generation.finish_reason}{seed}"


def _drop(job: Job) -> None:
    """Cancel a job that this command made for itself. The command's own error, if any, is the one to tell."""
    try:
        job.cancel()
    except MeshError as error:
        if sys.exc_info()[0] is None:
            note(f"job {job.id} could not be cancelled: {error}")
