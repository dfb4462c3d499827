"""Phase groups lora, attn_lora, router and base_ffn for EulerForge."""
