"""transformers' Trainer with a served teacher's labels: python transformers_trainer.py STUDENT ROWS.jsonl HOST:PORT OUTPUT"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from student_trainer.api import connect, gkd_loss

student, rows_file, address, output = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(student, padding_side="right")


def tokenised(row):
    """Ids, and labels that are -100 in the prompt."""
    prompt, answer = tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


class GkdTrainer(Trainer):
    """A Trainer whose loss is ours."""

    loss_is_scaled_for_ga = True  # it is divided by the labelled tokens of the whole window

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = teacher.labels(inputs["input_ids"], inputs["labels"] != -100)
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        found = gkd_loss(outputs.logits, labels, divergence="jsd", beta=0.5, normalizer=num_items_in_batch)
        return (found.loss, outputs) if return_outputs else found.loss


batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1}
arguments = TrainingArguments(output, learning_rate=1e-3, report_to="none", save_strategy="no", **batches)
model = AutoModelForCausalLM.from_pretrained(student, dtype="float32")
rows = load_dataset("json", data_files=rows_file, split="train").map(tokenised, remove_columns=["prompt", "completion"])
with connect(address, tokenizer=tokenizer) as teacher:
    GkdTrainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows).train()
