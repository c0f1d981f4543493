"""TRL's SFTTrainer with a served teacher's labels beside the rows' own: python trl_sft.py STUDENT ROWS.jsonl HOST:PORT OUTPUT"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from student_trainer.api import connect, gkd_loss

student, rows_file, address, output = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(student)


class TeacherSFTTrainer(SFTTrainer):
    """SFT with soft labels; batches come right-padded from TRL, with -100 where nothing is learned."""

    loss_is_scaled_for_ga = True  # it is divided by the labelled tokens of the whole window

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = teacher.labels(inputs["input_ids"], inputs["labels"] != -100)
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        found = gkd_loss(outputs.logits, labels, sft_weight=0.5, normalizer=num_items_in_batch)
        self._metrics["train" if model.training else "eval"]["kd"].append(found.kd.item())  # TRL logs the means
        return (found.loss, outputs) if return_outputs else found.loss


batches = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1}
config = SFTConfig(output, learning_rate=1e-3, bf16=False, report_to="none", save_strategy="no", **batches)
model = AutoModelForCausalLM.from_pretrained(student, dtype="float32")
rows = load_dataset("json", data_files=rows_file, split="train")  # columns prompt and completion
with connect(address, tokenizer=tokenizer) as teacher:
    TeacherSFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer).train()
