"""hsmn-dist generate: write text with a trained model, as it is made."""

from __future__ import annotations

from pathlib import Path

import typer

from hsmn_dist.foundation.errors import ConfigError

EXAMPLE = 'Examples: hsmn-dist generate latest --prompt "What is 2 + 3?";  hsmn-dist generate RUN --context book.txt --prompt "Who came?"'


def command(
    run: str = typer.Argument(help="Run id, its beginning or end, a path, `latest`, or a folder of weights."),
    prompt: str = typer.Option("", help="What the model continues."),
    context: Path | None = typer.Option(None, help="Text file that is read before the prompt."),
    stage: int | None = typer.Option(None, help="Stage whose weights are used; the newest complete one when absent."),
    max_context_tokens: int | None = typer.Option(
        None, min=1, help="Longest context that is read, its newest tokens; as in training when absent."
    ),
    max_new_tokens: int = typer.Option(128, help="Longest answer."),
    temperature: float = typer.Option(0.0, help="0 is greedy."),
    top_k: int = typer.Option(0, help="Keep the k most probable tokens; 0 keeps all."),
    top_p: float = typer.Option(1.0, help="Keep the most probable tokens with this mass."),
    stop: list[str] = typer.Option([], help="String that ends the text. May be repeated."),
    seed: int = typer.Option(0, help="Seed of sampling."),
    uses_sparse_kernels: bool = typer.Option(
        False, "--sparse-kernels", help="Run 2:4 pruned matrices on a GPU's sparse tensor cores, the model in bf16."
    ),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs."),
) -> None:
    """Continue a prompt; the text is printed as it is made."""
    text = prompt
    if context is not None:
        try:
            text = f"{context.read_text(encoding='utf-8')}\n{prompt}"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{context}: {error}", allowed="a readable UTF-8 text file", action="correct --context"
            ) from error
    if not text:
        raise ConfigError(
            "no prompt and no context", allowed="--prompt TEXT, --context FILE, or both", action="give one"
        )
    from hsmn_dist.models.generation import GenerationSettings
    from hsmn_dist.models.pruning import move_to_sparse_kernels
    from hsmn_dist.orchestration.trained_model import load_trained

    settings = GenerationSettings(max_new_tokens, temperature, top_k, top_p, tuple(stop), seed)
    trained = load_trained(run, run_root, stage)
    if uses_sparse_kernels:
        move_to_sparse_kernels(trained.model)
    model = trained.text_model(batch_examples=1, max_context_tokens=max_context_tokens)
    num_tokens = len(model.tokenizer.encode(text))
    if num_tokens > model.max_context_tokens:
        typer.echo(
            f"note: of the {num_tokens} context tokens the last {model.max_context_tokens} are read"
            + (", as many as in training" if max_context_tokens is None and trained.config else "")
            + f"; all of them with --max-context-tokens {num_tokens}",
            err=True,
        )
    for piece in model.stream(text, settings):
        typer.echo(piece, nl=False)
    typer.echo()
