// One question over the event stream, with Go's standard library alone:
//
//	go run ask.go [URL [QUESTION]]
package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type request struct {
	Messages     []message `json:"messages"`
	Conversation string    `json:"conversation"`
	Stream       bool      `json:"stream"`
}

func main() {
	url, question := "http://localhost:8000", "Hello!"
	if len(os.Args) > 1 {
		url = strings.TrimSuffix(os.Args[1], "/")
	}
	if len(os.Args) > 2 {
		question = os.Args[2]
	}
	if err := ask(url, question, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// ask writes the reply's tokens as they come.
func ask(url, question string, out io.Writer) error {
	id := make([]byte, 16) // anyone who knows it can read the conversation
	if _, err := rand.Read(id); err != nil {
		return err
	}
	body, err := json.Marshal(request{
		Messages:     []message{{Role: "user", Content: question}},
		Conversation: hex.EncodeToString(id),
		Stream:       true,
	})
	if err != nil {
		return err
	}
	answer, err := http.Post(url+"/chat", "application/json", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return readError(answer.Body)
	}
	return copyTokens(answer.Body, out)
}

// copyTokens parses the event stream: an event ends with an empty line.
func copyTokens(stream io.Reader, out io.Writer) error {
	lines := bufio.NewReader(stream)
	event, data := "", []string{}
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return errors.New("the connection broke before the end of the reply")
		}
		field, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case field == "event":
			event = value
		case field == "data":
			data = append(data, value)
		case line == "\n" && len(data) > 0:
			token := strings.Join(data, "\n")
			if event == "error" {
				return readError(strings.NewReader(token))
			}
			if token == "[DONE]" {
				fmt.Fprintln(out)
				return nil
			}
			if event == "truncated" { // its data is {"reason": "..."}
				token = " (truncated: " + token + ")"
			}
			fmt.Fprint(out, token)
			event, data = "", data[:0]
		}
	}
}

func readError(body io.Reader) error {
	var answer struct {
		Error string `json:"error"`
	}
	if err := json.NewDecoder(body).Decode(&answer); err != nil {
		return err
	}
	return errors.New(answer.Error)
}
