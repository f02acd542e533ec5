"""What a person asks for, from the request to the finished file: no Gradio and no HTTP in here."""
