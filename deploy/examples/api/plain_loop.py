"""A plain torch loop that learns from a served teacher: python plain_loop.py STUDENT ROWS.jsonl HOST:PORT"""

import sys

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.api import connect, gkd_loss

student, rows_file, address = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(student)
model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def collate(rows):
    """Right-padded ids, and a mask of the tokens to learn: the answers and their end."""
    pairs = [(tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"])) for row in rows]
    length = max(len(prompt) + len(answer) + 1 for prompt, answer in pairs)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    for number, (prompt, answer) in enumerate(pairs):
        tokens = [*prompt, *answer, tokenizer.eos_token_id]
        ids[number, : len(tokens)] = torch.tensor(tokens)
        mask[number, len(prompt) : len(tokens)] = True
    return {"input_ids": ids, "loss_mask": mask}


rows = load_dataset("json", data_files=rows_file, split="train")  # columns prompt and completion
with connect(address, tokenizer=tokenizer) as teacher:
    for epoch in range(2):
        for batch, labels in teacher.ahead(DataLoader(rows, batch_size=4, collate_fn=collate)):
            states = model.model(batch["input_ids"]).last_hidden_state  # logits are made in chunks, in the loss
            found = gkd_loss(states, labels, head=model, temperature=2.0, tau_squared=True, sft_weight=0.5)
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: kd {found.kd:.4f} ce {found.ce:.4f}; asked {teacher.usage.teacher_sequences} sequences")
