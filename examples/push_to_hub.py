"""Push a finished folder to the Hub: a pipeline, a tokenizer or a language model, with its card and images.

    python examples/push_to_hub.py outputs/digits/pipeline user/digits --report outputs/digits/report.json

The card is made from the run's options, validation metrics and reports; what people wrote into the card, here or on
the Hub, stays. Only files that belong to a model are uploaded, and nothing that a link leads to outside the folder.
--self_contained adds the code, so that the repository also loads where dar_hf is not installed.
Log in first with `hf auth login`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dar_hf.evaluation import read_report
from dar_hf.hub import (
    check_complete,
    empty_model,
    export_remote_code,
    model_files,
    prepare_repository,
    push_folder,
)
from dar_hf.hub.run_cards import take_report, write_run_card
from dar_hf.utils.commands import FAILURE, command


@command("push_to_hub.py", FAILURE)
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the saved model or the output folder of a run")
    parser.add_argument("repo_id", help="name or owner/name; created if missing")
    parser.add_argument(
        "--report", nargs="+", default=[], help="reports to add to folder and card, with the images next to them"
    )
    parser.add_argument("--self_contained", action="store_true", help="add the code that loads the model")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", help="branch to push to, created if missing; default main")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--commit_message")
    args = parser.parse_args(argv)
    # without --private, an existing repository stays as it is
    options = {"private": args.private or None, "revision": args.revision}
    files, _ = model_files(args.folder)  # rejects links out of the folder before anything is read through them
    class_name = type(empty_model(args.folder)).__name__
    check_complete(files, class_name)
    for report in args.report:
        read_report(report)
    prepare_repository(args.repo_id, class_name, **options)  # if the Hub refuses, the folder stays as it is
    for report in args.report:
        take_report(report, args.folder)
    if args.self_contained:
        export_remote_code(args.folder)
    if args.report or Path(args.folder, "training.json").is_file():
        write_run_card(args.folder, args.repo_id)
    commit = push_folder(args.folder, args.repo_id, args.commit_message, create_pr=args.create_pr, **options)
    print(commit.pr_url or commit.repo_url)


if __name__ == "__main__":
    main()
