"""`compress push`: publish an exported folder on the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CompressError, InterruptedPush, UsageError
from . import _github, _options, _render
from ._errors import INTERRUPTED, Told, classify

if TYPE_CHECKING:
    from ..recipes.export import PushSettings
    from ._output import Output

_Repository = Annotated[
    str,
    typer.Argument(metavar="ORG/NAME[@BRANCH]", help="The repository; made if absent.", show_default=False),
]
_Public = Annotated[
    bool | None,
    typer.Option(
        "--public/--private",
        help="Who sees a new repository; without either, its members. --private refuses a public one.",
        show_default=False,
    ),
]


def push(
    context: typer.Context,
    folder: _options.FolderArgument,
    repository: _Repository,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to push to; made if absent.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag the commit once it is verified.")] = None,
    message: Annotated[str | None, typer.Option(help="First line of the commit message.")] = None,
    public: _Public = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace or delete files there that compress did not write.")
    ] = False,
    no_verify_remote: Annotated[
        bool, typer.Option("--no-verify-remote", help="Do not download and verify what was pushed.")
    ] = False,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Publish a folder on the Hub, in one commit.

    The folder is verified first; what was pushed is downloaded and verified again. Files that are there
    already are not sent. The token comes from HF_TOKEN or `hf auth login`, the Hub from HF_ENDPOINT.

    Examples:
      compress push out/dit-w4a8 my-org/dit-w4a8
      compress push out/dit-w4a8 my-org/dit-w4a8@candidate --tag v1.0
      compress push out/dit-w4a8 my-org/dit-w4a8 --create-pr
    """
    sink = _options.sink(context, as_json, quiet, debug)
    settings = _settings(
        repo=repository,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        message=message,
        overwrite=overwrite,
        verify_remote=not no_verify_remote,
        **({} if public is None else {"private": not public}),
    )
    from .. import pipeline

    try:
        with sink.progress() as progress:
            document = pipeline.push(folder, settings, progress=progress)
    except CompressError as error:
        _pass_on(sink, settings.repo, error)
        raise
    except InterruptedPush as error:  # typer would make a plain Ctrl-C of it
        _pass_on(sink, settings.repo, error)
        sink.failure(classify(error, started=True), error)
        raise Told(INTERRUPTED) from None
    _show(sink, document)


def _show(sink: Output, document: dict[str, Any]) -> None:
    """Show where the folder was pushed, also to the job summary and later steps."""
    pushed = document["push"]
    done = "was up to date" if pushed["up_to_date"] else f"{pushed['files_sent']} files sent"
    sections = [*_render.anything(pushed), f"{pushed['url']}: {done}"]
    sink.result(document, sections)
    warning = _github.write(
        f"compress push: {pushed['repo']}", sections, {"exit_code": 0, **_github.push_outputs(pushed)}
    )
    if warning is not None:
        sink.warning(warning)


def _pass_on(sink: Output, repo: str, error: CompressError | InterruptedPush) -> None:
    """Tell the job summary and later steps that the push failed, and why."""
    failure = classify(error, started=False)
    sections = [f"exit code {failure.exit_code}: {failure.message}"]
    sections += [f"hint: {failure.hint}"] if failure.hint else []
    outputs = {"exit_code": failure.exit_code, **_github.push_outputs(error.push or {})}
    warning = _github.write(f"compress push: {repo} FAILED", sections, outputs)
    if warning is not None:
        sink.warning(warning)


def _settings(**values: Any) -> PushSettings:
    """Validate what was asked for as a recipe's `export.push` is.

    Raises:
        UsageError: naming the option.
    """
    from pydantic import ValidationError

    from ..recipes.export import PushSettings

    if values["revision"] is not None and "@" in values["repo"]:
        raise UsageError(
            f"{values['repo']}: a branch is given twice, after @ and by --revision", hint="give one of them"
        )
    try:
        return PushSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "push"
        option = "ORG/NAME" if name == "repo" else f"--{name.replace('_', '-')}"
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{option}: {reason}", hint="see `compress push --help`") from None
