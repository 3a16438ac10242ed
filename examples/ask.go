// One question over an event stream, in Go 1.18 or newer:  go run ask.go [URL QUESTION]
package main

import (
	"bufio"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"strings"
)

func main() {
	args := append(os.Args[1:], "http://localhost:8000", "Hello!")
	id := make([]byte, 16) // anyone who knows it can read the conversation
	rand.Read(id)
	messages := []any{map[string]string{"role": "user", "content": args[1]}}
	body, _ := json.Marshal(map[string]any{"messages": messages, "conversation": fmt.Sprintf("%x", id), "stream": true})
	answer, err := http.Post(args[0]+"/chat", "application/json", strings.NewReader(string(body)))
	if err != nil {
		log.Fatal("error: ", err)
	}
	for lines, event := bufio.NewScanner(answer.Body), map[string]string{}; lines.Scan(); {
		field, value, _ := strings.Cut(lines.Text(), ": ")
		if answer.StatusCode != http.StatusOK || event["event"] == "\nerror" {
			log.Fatal("error: ", strings.TrimPrefix(lines.Text(), "data: ")) // {"error":"..."}
		} else if field != "" {
			event[field] += "\n" + value // a token with newlines has several data lines
		} else if event["data"] == "\n[DONE]" {
			return
		} else { // an empty line ends the event, which is a token or has a name, such as truncated
			fmt.Print(event["event"], strings.TrimPrefix(event["data"], "\n"))
			event = map[string]string{}
		}
	}
	log.Fatal("error: the connection broke before the end of the reply")
}
