"""From prompts to text, and who drafts."""
