"""Chats: templates, examples to fine-tune on, and how a folder's model reads and ends text."""
