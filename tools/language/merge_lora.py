"""Merge a LoRA adapter into its base model; the merged model has the same logits.

If the adapter changes the embeddings, the head is untied: it was trained with the original embeddings.
"""

import argparse

from mmengine.logging import print_log

from grootvl_mm.apis import cli


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder of the adapter, i.e. the work dir of finetune.py")
    parser.add_argument("output", help="output folder for the model and its tokenizer")
    parser.add_argument("--base", help="folder or hub name of the base model (default: as stored in the adapter)")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_args()
    with cli.language_errors():
        from grootvl_mm.language.loading import ADAPTER, is_adapter, load_model, load_tokenizer
        from grootvl_mm.language.lora import merge_lora

        if not is_adapter(args.adapter):
            cli.fail(f"{args.adapter!r} is not the folder of an adapter: it has no {ADAPTER}")
        model = merge_lora(load_model(args.adapter, base=args.base))
        model.save_pretrained(args.output)
        load_tokenizer(args.adapter).save_pretrained(args.output)
    print_log(f"Wrote the merged model to {args.output}")


if __name__ == "__main__":
    main()
