"""Merge an adapter into its model, which then gives the same logits without it.

If the adapter changes the embedding, the head gets weights of its own: it was trained with those that the two shared
before.
"""

import argparse

from mmengine.logging import print_log

from grootvl_mm.apis import cli


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder of the adapter, the work dir of finetune.py")
    parser.add_argument("output", help="folder for the model and its tokenizer")
    parser.add_argument("--base", help="folder or hub name of the adapter's model, if it has moved")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_args()
    with cli.language_errors():
        from grootvl_mm.language.loading import ADAPTER, is_adapter, load_model, load_tokenizer
        from grootvl_mm.language.lora import merge_lora

        if not is_adapter(args.adapter):
            cli.fail(f"{args.adapter!r} has no {ADAPTER}; give the folder of an adapter")
        model = merge_lora(load_model(args.adapter, base=args.base))
        model.save_pretrained(args.output)
        load_tokenizer(args.adapter).save_pretrained(args.output)
    print_log(f"The merged model is in {args.output}.")


if __name__ == "__main__":
    main()
