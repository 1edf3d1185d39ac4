"""What a Hugging Face folder answers: `python -m tanren.stages.generate FOLDER PROMPT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch


def generate(folder: Path, prompt: str, tokens: int, *, chat: bool, seed: int = 0) -> str:
    """The model's answer to a prompt, the same at every call.

    Args:
        folder: a model, or a PEFT folder beside its base.
        chat: ask by the folder's chat template; else the text goes on from the prompt.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if chat:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True,
            return_tensors="pt", return_dict=True,
        )  # fmt: skip
    else:
        asked = tokenizer(prompt, return_tensors="pt")
    ids = asked["input_ids"]
    transformers.set_seed(seed)
    with torch.no_grad():
        result = model.generate(
            ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.9,
            attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    # Of a chat the answer alone; of a text all of it.
    said = result[0][ids.shape[1] :] if chat else result[0]
    return str(tokenizer.decode(said, skip_special_tokens=True))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tanren generate")
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat", action="store_true")
    given = parser.parse_args(arguments)
    text = generate(given.folder, given.prompt, given.tokens, chat=given.chat, seed=given.seed)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
