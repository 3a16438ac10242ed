#!/bin/sh
# The API with curl alone:  ./curl.sh [URL]
set -eu
url=${1:-http://localhost:8000}
url=${url%/}
conversation=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') # anyone who knows it can read it

echo "As JSON:"
curl -sS --fail-with-body "$url/chat" -d '{
  "conversation": "'"$conversation"'",
  "messages": [{"role": "user", "content": "Hello!"}]
}'

printf '\n\nAs an event stream:\n'
curl -sSN --fail-with-body "$url/chat" -d '{
  "conversation": "'"$conversation"'",
  "messages": [{"role": "user", "content": "And again!"}],
  "stream": true
}'

echo "What is remembered:"
curl -sS --fail-with-body "$url/conversations/$conversation"
curl -sS --fail-with-body -X DELETE "$url/conversations/$conversation"
echo
