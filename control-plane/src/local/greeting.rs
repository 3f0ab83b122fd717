//! What `local` says on stdout when it is up: all that people need for curl.

use std::io::{self, Write as _};

use super::{Local, addresses::reachable};

impl Local {
    /// Tells people, on stdout, what they need for curl.
    pub(super) fn say_how_to_talk(&self) {
        let token = self.data.operator_token_file();
        let token = quoted(&token.to_string_lossy());
        let text = format!(
            "\
Ambient runs on this machine. All state is in {data}

  session API     {rest}
  over gRPC       {grpc}
  token endpoint  http://{endpoint}/token

Talk with it, in another terminal:

  api={rest}
  auth=\"Authorization: Bearer $(cat {token})\"
  curl -sS -H \"$auth\" \"$api/sessions\" -d '{{\"name\": \"first\", \"prompt\": \"Hello\"}}'
  curl -sS -H \"$auth\" \"$api/sessions\"
  id=…   # the \"id\" of a session
  curl -sS -H \"$auth\" \"$api/sessions/$id/messages\" -d '{{\"payload\": \"How are you?\"}}'
  curl -sS -H \"$auth\" \"$api/sessions/$id/messages\"
  curl -sS -H \"$auth\" -X POST \"$api/sessions/$id/stop\"

Ctrl-C ends this program. Sessions go on; the next start on that folder finds them.
",
            data = self.data.path().display(),
            rest = self.operator.rest,
            grpc = reachable(self.addresses.grpc),
            endpoint = reachable(self.addresses.token),
        );
        let mut stdout = io::stdout();
        // Nobody may be reading it.
        let _ = stdout.write_all(text.as_bytes());
        let _ = stdout.flush();
    }
}

/// A text as one word of a shell.
fn quoted(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte);
    if text.bytes().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}
