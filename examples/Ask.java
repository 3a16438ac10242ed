// One question over an event stream, with Java 11 or newer alone:  java Ask.java [URL QUESTION]

import java.io.PrintStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.util.UUID;

public class Ask {
    public static void main(String[] args) throws Exception {
        String url = args.length == 2 ? args[0] : "http://localhost:8000";
        String question = args.length == 2 ? args[1] : "Hello!";
        String quoted = question.replace("\\", "\\\\").replace("\"", "\\\""); // or a JSON library
        String id = UUID.randomUUID().toString(); // anyone who knows it can read the conversation
        String body = "{\"messages\":[{\"role\":\"user\",\"content\":\"" + quoted + "\"}],"
                + "\"conversation\":\"" + id + "\",\"stream\":true}";
        var request = HttpRequest.newBuilder(URI.create(url + "/chat"));
        var response = HttpClient.newHttpClient() // it offers HTTP/2, and is answered over HTTP/1.1
                .send(request.POST(BodyPublishers.ofString(body)).build(), BodyHandlers.ofLines());
        var out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
        String event = "", token = "", end = "the connection broke before the end of the reply";
        for (String line : (Iterable<String>) response.body()::iterator) {
            if (response.statusCode() != 200) end = line; // {"error":"..."}
            else if (line.startsWith("event: ")) event = line.substring(7);
            else if (line.startsWith("data: ")) token += "\n" + line.substring(6);
            else if (event.equals("error")) end = token;
            else if (token.equals("\n[DONE]")) end = "";
            else if (event.equals("truncated")) out.print(" (truncated: " + token.strip() + ")");
            else if (!token.isEmpty()) out.print(token.substring(1));
            if (line.isEmpty()) event = token = "";
        }
        out.println();
        if (!end.isEmpty()) System.err.println("error: " + end.strip());
        System.exit(end.isEmpty() ? 0 : 1);
    }
}
