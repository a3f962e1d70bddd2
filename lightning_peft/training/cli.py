"""The command line: LightningCLI's commands from a YAML, and those that need none: ``methods``, ``inspect``, ``convert``, ``merge`` ...

The four Lightning commands are a LightningCLI over :class:`PEFTLightningModule` and :class:`PEFTDataModule`. A mistake in a config
is one line on stderr and exit status 2, never a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_peft.checkpoint import inspect_adapter
from lightning_peft.errors import ConfigError, PEFTError, did_you_mean
from lightning_peft.interop import is_hf_folder, suitability
from lightning_peft.strategies.registry import list_methods, resolve
from lightning_peft.training import comparing, estimating
from lightning_peft.training.catalogue import method_card, methods_table
from lightning_peft.training.converting import convert
from lightning_peft.training.data import PEFTDataModule
from lightning_peft.training.module import PEFTLightningModule
from lightning_peft.training.serve import generate_text, merge_adapter

TRAINER_COMMANDS = {
    "fit": "train from a config; checkpoints and the adapter folder are written",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "generate or classify the prediction data, printed as one JSON value per row",
}


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, without the usage of a hundred options before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        self.exit(2, f"lightning-peft: {' '.join(message.split())}\n")
        raise AssertionError("exit() returns nothing")


class PEFTCLI(LightningCLI):
    """LightningCLI over our module and data module.

    The task and the labels are written once, under ``model``, and reach ``data`` by themselves.
    """

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True, **trainer_defaults: Any) -> None:
        list_methods()  # third parties' strategies become known class names
        super().__init__(
            PEFTLightningModule,
            PEFTDataModule,
            auto_configure_optimizers=False,
            # Not Lightning's config.yaml: without a logger it lands in default_root_dir, where the user's own may lie.
            save_config_kwargs={"config_filename": "config.resolved.yaml", "overwrite": True},
            trainer_defaults=trainer_defaults or None,
            seed_everything_default=0,
            args=list(args) if args is not None else None,
            parser_class=OneLineParser,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.task", "data.task")
        parser.link_arguments("model.labels", "data.labels")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        config = self.config[subcommand] if subcommand else self.config
        # A misspelt option passes the parser's union of types as a plain mapping; resolve() is what knows names and types.
        resolve(_plain(config.model.strategy))

    def instantiate_classes(self) -> None:
        """Make Trainer, module and data; whatever goes wrong there is a mistake in the config.

        Raises:
            ConfigError: A value is out of range, does not fit, or names what is not there.
        """
        try:
            super().instantiate_classes()
        except PEFTError:
            raise
        except (ValueError, TypeError, OSError, MisconfigurationException) as error:
            raise ConfigError(" ".join(str(error).split())) from error

    def after_predict(self) -> None:
        """Print the predictions, one JSON value per row."""
        if self.trainer.is_global_zero:
            for row in chain.from_iterable(self.trainer.predict_loop.predictions):
                print(json.dumps(row, ensure_ascii=False))


class ConfigOnly(PEFTCLI):
    """The same reading of a config, without a Trainer: the devices that it names may be elsewhere.

    Args:
        arguments: ``--config FILE`` and overrides, as of ``fit``.

    Raises:
        ConfigError: A value is out of range, does not fit, or names what is not there.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        with warnings.catch_warnings():
            # Lightning warns of arguments beside those of the process, which are the same ones here.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().__init__([*arguments, "--seed_everything=false"], run=False)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make no Trainer."""
        return None


class CompareConfig(ConfigOnly):
    """A config of ``fit`` with a section ``compare``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(comparing.CompareOptions, "compare")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``lightning-peft``."""
    args = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    command = args[0] if args else "--help"
    if not command.startswith("-") and command not in {*TRAINER_COMMANDS, *_COMMANDS}:
        parser.exit(2, f"lightning-peft: unknown command '{command}'.{did_you_mean(command, [*TRAINER_COMMANDS, *_COMMANDS])}\n")
    try:
        if command in TRAINER_COMMANDS:
            PEFTCLI(argv)
        else:
            options, rest = parser.parse_known_args(args or ["--help"])
            if rest and command not in ("estimate", "compare"):
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
            options.rest = rest
            print(_COMMANDS[options.command](options))
    except (PEFTError, FileNotFoundError) as error:
        if os.environ.get("LIGHTNING_PEFT_TRACEBACK"):
            raise
        parser.exit(2, f"lightning-peft: {type(error).__name__}: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-peft",
        description="Parameter-efficient fine-tuning. `lightning-peft COMMAND --help` explains each command.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=f"{text} (--config FILE)", add_help=False)
    bill = commands.add_parser("estimate", help="tell memory and work of a run before it runs (--config FILE, as of fit)")
    bill.add_argument(
        "--fit", metavar="MEMORY", help="find the largest batch that a device with this memory holds, such as 24GiB"
    )
    bill.add_argument("--vary", choices=("batch_size", "sequence_length"), default="batch_size", help="what --fit changes")
    bill.add_argument("--compare", metavar="METHODS", help="other methods beside the config's, such as lora,bitfit,full")
    bill.add_argument("--chart", metavar="FILE", help="write the comparison as a picture: .png, .svg, .pdf; needs matplotlib")
    bill.add_argument("--labelled", type=_positive(float), default=1.0, help="share of the tokens that have a label; default: 1")
    bill.add_argument("--json", action="store_true", help="print JSON instead of tables")
    compare = commands.add_parser(
        "compare", help="train several strategies on one task and compare them (--config FILE, as of fit)"
    )
    compare.add_argument(
        "--methods", metavar="NAMES", help="what to compare, such as lora,bitfit,full; default: compare.strategies"
    )
    compare.add_argument("--chart", metavar="FILE", help="write quality against trainable parameters: .png, .svg, .pdf")
    form = compare.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--markdown", action="store_true", help="print Markdown instead of a table")
    methods = commands.add_parser("methods", help="list the methods, or show one")
    methods.add_argument("name", nargs="?", help="a method, such as lora")
    inspect = commands.add_parser("inspect", help="show what an adapter folder or a checkpoint holds")
    inspect.add_argument("adapter", help="adapter folder, Lightning .ckpt, or with --for a repository on the hub")
    inspect.add_argument("--for", dest="target", choices=("hf", "vllm"), help="tell whether it loads there, and what to change")
    conversion = commands.add_parser("convert", help="convert an adapter to or from the format of Hugging Face peft")
    conversion.add_argument("source", help="adapter folder of either format, Lightning .ckpt, or a repository on the hub")
    conversion.add_argument("output", nargs="?", help="new folder; not needed with --push")
    conversion.add_argument("--to", choices=("hf", "native"), required=True, help="format of the result")
    conversion.add_argument("--base", help="base model; default: the one that the adapter names")
    conversion.add_argument("--revision", help="branch, tag or commit of a source on the hub")
    conversion.add_argument(
        "--as-lora", metavar="RANK", help="write any change of weights as a LoRA: 'exact', or at most this rank"
    )
    conversion.add_argument("--push", metavar="REPOSITORY", help="upload the result to this repository on the hub")
    conversion.add_argument("--private", action="store_true", help="make a new repository private")
    merge = commands.add_parser("merge", help="merge an adapter into its base and save a plain transformers model")
    merge.add_argument("adapter", help="adapter folder or Lightning .ckpt")
    merge.add_argument("output", help="new folder for the merged model and its tokenizer")
    merge.add_argument("--base", help="base model; default: the one that the adapter names")
    generate = commands.add_parser("generate", help="ask the base model with an adapter")
    generate.add_argument("adapter", help="adapter folder or Lightning .ckpt")
    generate.add_argument("text", nargs="+", help="one or more texts; each is put into the prompt the adapter was trained with")
    generate.add_argument("--base", help="base model; default: the one that the adapter names")
    generate.add_argument("--max-new-tokens", type=_positive(int), default=64)
    generate.add_argument("--sample", action="store_true", help="sample instead of greedy decoding")
    generate.add_argument("--temperature", type=_positive(float), help="with --sample; default: 1")
    generate.add_argument("--seed", type=int, default=0, help="with --sample")
    generate.add_argument("--raw", action="store_true", help="take the text as the whole prompt")
    return parser


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return read


def _plain(value: Any) -> Any:
    """Return a parsed value with mappings in place of jsonargparse's namespaces, also inside lists."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _methods(options: argparse.Namespace) -> str:
    return method_card(options.name) if options.name else methods_table()


def _inspect(options: argparse.Namespace) -> str:
    if options.target is None:
        return inspect_adapter(options.adapter)
    known = [] if is_hf_folder(options.adapter) or not os.path.exists(options.adapter) else [inspect_adapter(options.adapter)]
    return "\n".join([*known, suitability(options.adapter, options.target).text()])


def _convert(options: argparse.Namespace) -> str:
    rank = options.as_lora
    if rank not in (None, "exact") and not (rank.isdigit() and int(rank) > 0):
        raise ConfigError(f"--as-lora {rank}: 'exact' or a rank of at least 1 is needed.")
    return convert(
        options.source,
        options.output,
        to=options.to,
        base=options.base,
        revision=options.revision,
        as_lora=False if rank is None else True if rank == "exact" else int(rank),
        repository=options.push,
        private=options.private,
    )


def _merge(options: argparse.Namespace) -> str:
    return f"merged model: {merge_adapter(options.adapter, options.output, base=options.base)}"


def _generate(options: argparse.Namespace) -> str:
    if options.temperature is not None and not options.sample:
        raise ConfigError("--temperature needs --sample: greedy decoding draws nothing.")
    answers = generate_text(
        options.adapter,
        options.text,
        base=options.base,
        raw=options.raw,
        max_new_tokens=options.max_new_tokens,
        do_sample=options.sample,
        **({"temperature": options.temperature or 1.0} if options.sample else {}),
        seed=options.seed,
    )
    return "\n".join(answers)


def _estimate(options: argparse.Namespace) -> str:
    asked = {"labelled": options.labelled, "fit": options.fit, "vary": options.vary}
    if options.compare is None and options.chart is None:
        report = estimating.estimate_config(options.rest, **asked)
        return json.dumps(report.to_dict()) if options.json else estimating.text(report.table())
    reports = estimating.compare_config(options.rest, _names(options.compare), **asked)
    lines = [] if options.chart is None else [f"chart: {estimating.chart(reports, options.chart)}"]
    if options.json:
        return json.dumps([report.to_dict() for report in reports])
    return "\n".join([estimating.text(reports[0].table()), estimating.text(estimating.comparison(reports)), *lines])


def _compare(options: argparse.Namespace) -> str:
    found = comparing.compare(options.rest, _names(options.methods))
    lines = [] if options.chart is None else [f"chart: {found.chart(options.chart)}"]
    if options.json:
        return json.dumps(found.to_dict())
    if options.markdown:
        return found.markdown()
    return "\n".join([estimating.text(found.table()), *found.verdict(), *lines])


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


_COMMANDS = {
    "estimate": _estimate,
    "compare": _compare,
    "methods": _methods,
    "inspect": _inspect,
    "convert": _convert,
    "merge": _merge,
    "generate": _generate,
}
