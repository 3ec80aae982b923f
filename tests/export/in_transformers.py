"""What transformers makes of an exported folder, as a program of its own, so that any version of
transformers can run it: python in_transformers.py FOLDER REFERENCE.json

REFERENCE.json: text and its ids; inputs (B, T) and their logits; prompts and what our model makes
of them greedily; messages, the text and the ids of a conversation. One line of JSON says what was
found.
"""

import json
import sys
import warnings

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder, reference):
    transformers.logging.set_verbosity_error()
    with open(reference) as f:
        expected = json.load(f)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=torch.float32
    ).eval()
    found = dict(version=transformers.__version__, parameters=model.num_parameters())
    found["ids"] = tokenizer(expected["text"])["input_ids"]
    found["text"] = tokenizer.decode(found["ids"], skip_special_tokens=True)
    if "messages" in expected:
        found |= of_a_conversation(tokenizer, expected["messages"])

    with torch.no_grad():
        logits = model(torch.tensor(expected["inputs"])).logits
    n = len(expected["logits"][0][0])
    found["difference"] = (logits[..., :n] - torch.tensor(expected["logits"])).abs().max().item()
    found["written"] = [
        generate(model, [prompt], expected["n_tokens"])[0] for prompt in expected["prompts"]
    ]
    # All at once, padded on the left
    found["together"] = generate(model, expected["prompts"], min(20, expected["n_tokens"]))
    print(json.dumps(found))


def generate(model, prompts, n_tokens):
    """Greedily, n_tokens each, whatever ends a text."""
    longest = max(map(len, prompts))
    inputs = [[0] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            torch.tensor(inputs),
            attention_mask=torch.tensor(mask),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return out[:, longest:].tolist()


def of_a_conversation(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    both = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return dict(
        chat=text,
        chat_ids=both["input_ids"],
        assistant=both["assistant_masks"],
        asks=tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        ),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
