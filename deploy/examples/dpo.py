"""GKD, then DPO: what `train` or `export` left goes on in TRL's DPOTrainer. python deploy/examples/dpo.py MODEL PREFERENCES.jsonl OUT

MODEL is a folder as transformers reads it (an export, `final/` of a run that trains every weight, or merged adapters). A row of PREFERENCES has
`prompt`, `chosen` and `rejected`, each a list of messages. Needs `pip install trl`; see docs/after/dpo.md.
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def dpo(model: str, preferences: str, out: str, **settings: object) -> None:
    """Trains `model` on preferences and writes the result, with the tokenizer and its template as they were, to `out`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    student = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    rows = load_dataset("json", data_files=preferences, split="train")
    arguments = DPOConfig(output_dir=out, **{"learning_rate": 5e-7, "beta": 0.1, "report_to": "none", **settings})
    trainer = DPOTrainer(model=student, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(out)  # weights, config, tokenizer, chat template


if __name__ == "__main__":
    dpo(*sys.argv[1:4])
