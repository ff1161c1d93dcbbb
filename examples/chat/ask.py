"""Ask a chat model in a folder, with plain transformers: nothing of this repository is imported.

python examples/chat/ask.py out-manners/final "Why is the sky blue?"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
begin = inputs["input_ids"].shape[1]
room = model.config.max_position_embeddings - begin
output = model.generate(**inputs, max_new_tokens=min(64, room), do_sample=False)
print(tokenizer.decode(output[0, begin:], skip_special_tokens=True))
