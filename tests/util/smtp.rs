//! Deliveries over LMTP, through the server's unix socket.

use anyhow::bail;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// An LMTP session.
pub struct Lmtp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Lmtp {
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut lmtp = Self { stream, reader };
        lmtp.answer()?;
        lmtp.ask("LHLO lab.test\r\n")?;
        Ok(lmtp)
    }

    /// Delivers one message to all of them; one answer for each that was accepted.
    pub fn deliver(&mut self, to: &[&str], message: &[u8]) -> anyhow::Result<Vec<String>> {
        self.ask("MAIL FROM:<sender@ext.test>\r\n")?;
        let mut accepted = 0;
        let mut answers = Vec::new();
        for to in to {
            let answer = self.ask(&format!("RCPT TO:<{to}>\r\n"))?;
            match answer.starts_with('2') {
                true => accepted += 1,
                false => answers.push(answer),
            }
        }
        if accepted == 0 {
            self.ask("RSET\r\n")?;
            return Ok(answers);
        }
        let answer = self.ask("DATA\r\n")?;
        if !answer.starts_with('3') {
            bail!("DATA → {answer}");
        }
        let mut data = Vec::new();
        for line in message.split_inclusive(|&byte| byte == b'\n') {
            if line.starts_with(b".") {
                data.push(b'.');
            }
            data.extend_from_slice(line);
        }
        data.extend_from_slice(if message.ends_with(b"\r\n") { b".\r\n" } else { b"\r\n.\r\n" });
        self.stream.write_all(&data)?;
        for _ in 0..accepted {
            answers.push(self.answer()?);
        }
        Ok(answers)
    }

    fn ask(&mut self, line: &str) -> anyhow::Result<String> {
        self.stream.write_all(line.as_bytes())?;
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<String> {
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                bail!("lmtpd closed the connection");
            }
            if line.as_bytes().get(3) != Some(&b'-') {
                return Ok(line.trim_end().to_owned());
            }
        }
    }
}
