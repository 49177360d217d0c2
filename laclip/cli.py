"""The laclip command: one subcommand a tool, each imported only when it is asked for."""

import argparse
import importlib
import sys

COMMANDS = {
    "pack": ("laclip.prepare.pack", "a list of image paths and captions into webdataset shards"),
    "index": ("laclip.prepare.index", "scan webdataset tars into sample indexes"),
    "tokenize": ("laclip.prepare.tokenize", "captions and rewrites into the caption store"),
    "verify": ("laclip.prepare.verify", "check every file of a dataset against every other"),
    "rewrite": ("laclip.rewrite.command", "make rewrites of captions with a language model"),
    "evaluate": ("laclip.evaluation.command", "zero-shot, retrieval, linear probe, few-shot"),
    "plan": ("laclip.plan", "memory, time and disk of a run before it starts"),
    "report": ("laclip.report", "one HTML page of a run"),
    "import": ("laclip.import_weights", "weights of other projects, for model.weights"),
    "export": ("laclip.export_weights", "a run's weights for other projects"),
    "inspect": ("laclip.prepare.inspect", "look at a dataset, as text or as a page"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run `laclip COMMAND ...`; errors of the user's input exit with 2 and their message."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        args = _parse(given)
        return args.run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"laclip {given[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"laclip {given[0]}: stopped; run it again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:  # a full disk, a lack of rights: no fault of ours to trace
        print(f"laclip {given[0]}: {error}", file=sys.stderr)
        return 1


def _parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="laclip", description="Train CLIP with caption rewrites.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    wanted = given[0] if given else None
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == wanted:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
