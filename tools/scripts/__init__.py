"""Scripts of others on a folder that the user names: by their own optimizer, and by KFC."""
