"""`python -m pyctrlora.demo`: LoRA fine-tuning with AdamW and with CTROptimizer, side by side.

Everything it needs comes with Python; `pip install pyctrlora[demo]` brings the plotting and the
progress bars. `train.compare` is the comparison as a function.
"""
