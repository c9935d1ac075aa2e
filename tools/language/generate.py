"""Generate text with a GrootL or Mamba model: answer an instruction, or continue a prompt.

Instructions use the same prompt template as fine-tuning. The text is written to stdout as it is generated.
"""

import argparse

from mmengine.device import get_device

from grootvl_mm.apis import cli


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a model, or folder of an adapter")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--instruction", help="instruction, inserted into Alpaca's template")
    prompt.add_argument("--prompt", help="complete prompt, used without a template")
    parser.add_argument("--input", default="", help="input of the instruction (default: none)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="maximum number of generated tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="sampling temperature; 0 is greedy decoding (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, help="random seed for sampling (default: random)")
    parser.add_argument(
        "--device", default=get_device(), help="device of the model, e.g. cuda:1 (default here: %(default)s)"
    )
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if args.temperature < 0:
        parser.error(f"--temperature must not be negative, got {args.temperature}")
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    with cli.language_errors():
        import torch
        from transformers import TextStreamer, set_seed

        from grootvl_mm.language.data import PromptTemplate, encode_prompts
        from grootvl_mm.language.loading import load_model, load_tokenizer

        tokenizer = load_tokenizer(args.model)
        model = load_model(args.model).to(args.device)
        text = args.prompt or PromptTemplate().prompt(args.instruction, args.input)
        prompt = torch.tensor(encode_prompts(tokenizer, [text]), device=args.device)
        if args.seed is not None:
            set_seed(args.seed)
        sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )


if __name__ == "__main__":
    main()
