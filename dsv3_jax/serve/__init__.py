"""`dsv3 serve`: a model behind OpenAI's interface, and a page that shows its experts at work."""
